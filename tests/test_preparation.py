"""Starting a runner: what an earlier start lowered is used, and nothing else is; programs keep their donations and shardings."""

import contextlib
import logging
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import export, monitoring
from jax._src.pallas.triton.gpu_info import get_gpu_info_from_version, gpu_version_from_device_kind
from jax.sharding import Mesh
from jax.stages import Compiled

import jaxserve
from jaxserve.config import EXECUTABLES_FOLDER, LOWERED_FOLDER, ModelOptions
from jaxserve.lowering_processes import LoweringFailed, LoweringProcesses
from jaxserve.models import Architecture, Model, ModelConfig
from jaxserve.models.kv_scaling import KVScaling
from jaxserve.runner import ModelRunner, Preparation, RunnerConfig, kernel_compilation, make_mesh, preparation
from jaxserve.runner.batch import BatchLayout
from jaxserve.runner.blueprint import KNOWN_GPUS, Blueprint, digest_sources, lowered_kind
from jaxserve.runner.buckets import Bucket
from jaxserve.runner.compile import CACHE_HIT_EVENT
from jaxserve.runner.kv_cache import plan_kv_cache
from jaxserve.runner.lowering import compile_lowered, lower
from jaxserve.runner.program_store import ProgramStore
from jaxserve.runner.programs import Program, ProgramKey, Programs
from jaxserve.weights import ModelSource
from jaxserve.weights.loader import load_model, open_model

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 512,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 128,
    "vocab_size": 320,
    "max_position_embeddings": 512,
}
H200 = dict(device_kind="NVIDIA H200", num_cores=132, device_platform="gpu", platform="cuda")
BUCKET = Bucket(1, 1, True)
FORWARD = ProgramKey("forward", BUCKET)


@pytest.fixture(scope="module")
def source(tiny_checkpoint: Callable[[str], Path]) -> ModelSource:
    return ModelSource("tiny", "", tiny_checkpoint("llama"))


class CompiledOnce:
    """compile_lowered(), but of the same module once and unoptimised: who compiles what and when is tested here, and XLA is slow.

    XLA serializes those of `logprobs` and `score` but once: a second folder does not get them.
    """

    def __init__(self) -> None:
        self._compiled: dict[tuple[str, int, str], Compiled] = {}

    def __call__(self, lowered: bytes, program: Program, mesh: Mesh) -> Compiled:
        text = export.deserialize(bytearray(lowered)).mlir_module()
        key = re.sub(r"(?m)^#loc.*\n|loc\(\S+\)", "", text), mesh.size, str(program.options)  # wherever it was called from
        if key not in self._compiled:
            options = {**program.options, "xla_backend_optimization_level": 0}
            self._compiled[key] = compile_lowered(lowered, program._replace(options=options), mesh)
        return self._compiled[key]


@pytest.fixture(scope="module")
def compiled_once() -> CompiledOnce:
    return CompiledOnce()


@pytest.fixture
def prepare(
    source: ModelSource, compiled_once: CompiledOnce, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Preparation, list[str]]]:
    """(config, ...) -> a preparation that has begun, and the names of what it lowers in this process."""
    # XLA's own cache is for the whole process: test_precompile.py has one to itself.
    monkeypatch.setattr(preparation, "use_compilation_cache", lambda folder: None)
    monkeypatch.setattr(preparation, "compile_lowered", compiled_once)
    opened = open_model(source, ModelOptions(), make_mesh(1))

    def prepare(config: RunnerConfig, tensor_size: int = 1, **options: Any) -> tuple[Preparation, list[str]]:
        lowered: list[str] = []

        def count(program, platform):
            lowered.append(program.function.__name__)
            return lower(program, platform)

        monkeypatch.setattr(preparation, "lower", count)
        return Preparation(opened.architecture, opened.dtype, make_mesh(tensor_size), config, **options), lowered

    return prepare


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunnerConfig:
    """Eight programs, and a folder that the tests of this module share, which is left with all of them."""
    return RunnerConfig(1, 32, max_total_tokens=64, compilation_cache_dir=str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def copied(prepare, config: RunnerConfig, tmp_path: Path) -> RunnerConfig:
    """The same with a folder of its own, in which all programs are."""
    dict(prepare(config)[0].programs())
    folder = shutil.copytree(config.compilation_cache_dir or "", tmp_path / "copy")
    return replace(config, compilation_cache_dir=str(folder))


def first_logits(model: Model, runner_config: RunnerConfig, prepared: Preparation) -> list[float]:
    """Logits of token 5 at position 0, by the compiled decode program."""
    runner = ModelRunner(model, make_mesh(1), runner_config, prepared)
    runner.warmup()
    runner.close()
    layout = BatchLayout.of(BUCKET, 1, runner_config.page_size)
    packed = runner._packer.padding(layout)
    step = runner._executor._compiled[FORWARD](model.leaves, runner._executor._state, jnp.asarray(packed))
    return step[1][0, :8].tolist()


def test_a_second_start_traces_nothing_of_the_model(prepare, config: RunnerConfig, source: ModelSource, monkeypatch):
    model = load_model(source, ModelOptions(), make_mesh(1))
    first, lowered = prepare(config)
    logits = first_logits(model, config, first)
    assert len(lowered) == 8

    def traced(*_: object) -> None:
        raise AssertionError("the model was traced")

    monkeypatch.setattr(Architecture, "apply", traced)
    second, lowered = prepare(config)
    assert first_logits(model, config, second) == logits
    assert lowered == []
    assert len(list((Path(config.compilation_cache_dir or "") / EXECUTABLES_FOLDER).iterdir())) == 8
    assert first.plan() == second.plan()


def damage_two(folder: Path) -> Callable[[], bool]:
    """Damage the two largest files of a store; gives what tells whether all are sound again."""
    names = [path.name for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_size, reverse=True)]
    for name, end in zip(names, (b"", b"\1"), strict=False):
        (folder / name).write_bytes((folder / name).read_bytes()[:-1] + end)
    return lambda: all(map(ProgramStore(folder).read, names)) and {path.name for path in folder.iterdir()} == set(names)


def test_another_config_or_a_damaged_file_is_made_again(
    prepare, copied: RunnerConfig, compiled_once: CompiledOnce, monkeypatch: pytest.MonkeyPatch
):
    compiled: list[str] = []

    def count(lowered, program, mesh):
        compiled.append(program.function.__name__)
        return compiled_once(lowered, program, mesh)

    monkeypatch.setattr(preparation, "compile_lowered", count)
    folder = Path(copied.compilation_cache_dir or "")
    executables, lowered_folder = folder / EXECUTABLES_FOLDER, folder / LOWERED_FOLDER
    sound = damage_two(executables)
    again, lowered = prepare(copied)
    dict(again.programs())
    assert sound() and len(compiled) == 2 and not lowered
    shutil.rmtree(executables)
    sound = damage_two(lowered_folder)
    again, lowered = prepare(copied)
    dict(again.programs())
    assert sound() and len(compiled) == 2 + 8 and len(lowered) == 2
    other, lowered = prepare(replace(copied, masked=True))
    assert len(dict(other.programs())) == 9 and lowered


def test_what_xlas_own_cache_gave_is_not_kept(prepare, copied: RunnerConfig, compiled_once: CompiledOnce, monkeypatch):
    def found(lowered, program, mesh):
        monitoring.record_event(CACHE_HIT_EVENT)
        return compiled_once(lowered, program, mesh)

    executables = Path(copied.compilation_cache_dir or "") / EXECUTABLES_FOLDER
    shutil.rmtree(executables, ignore_errors=True)
    with monkeypatch.context() as patched:
        patched.setattr(preparation, "compile_lowered", found)
        assert len(dict(prepare(copied)[0].programs())) == 8
    assert not executables.exists()


@pytest.mark.parametrize("tensor_size", [1, 2])
def test_the_state_is_donated_and_stays_where_it_is(prepare, config: RunnerConfig, tensor_size: int, tmp_path: Path):
    config = replace(config, kv_bytes=1 << 20, compilation_cache_dir=str(tmp_path))
    dict(prepare(config, tensor_size)[0].programs())
    prepared, _ = prepare(config, tensor_size)  # what is read from files is as what was compiled
    plan, compiled = prepared.plan(), dict(prepared.programs())
    for key in (FORWARD, ProgramKey("copy_pages"), ProgramKey("load_slot"), ProgramKey("add_page_entries")):
        analysis = compiled[key].memory_analysis()
        assert analysis is not None and analysis.alias_size_in_bytes >= plan.nbytes
        state = 1 if key is FORWARD else 0
        before = jax.tree.leaves(compiled[key].input_shardings[0][state])
        results = compiled[key].output_shardings
        after = jax.tree.leaves(results[0] if key is FORWARD else results)
        assert len(before) == len(after) and (tensor_size == 1 or [s.spec for s in before] == [s.spec for s in after])


def test_more_temporaries_than_expected(prepare, config: RunnerConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = replace(config, compilation_cache_dir=str(tmp_path))
    budgets: list[int] = []

    def plan(*arguments: Any):
        budgets.append(arguments[-1])
        return plan_kv_cache(*arguments)

    monkeypatch.setattr(preparation, "kv_cache_bytes", lambda *_: 1 << 24)
    monkeypatch.setattr(preparation, "plan_kv_cache", plan)
    monkeypatch.setattr(preparation, "expected_temporaries", lambda blueprint: 0)
    prepared, _ = prepare(config)
    assert len(dict(prepared.programs())) == 8
    _, expected, measured = budgets
    assert 0 < measured < expected
    again, lowered = prepare(config)  # and the next start knows
    assert budgets[-1] == measured and len(dict(again.programs())) == 8 and not lowered


def test_other_processes_lower(prepare, config: RunnerConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch):
    config = replace(config, compilation_cache_dir=str(tmp_path))
    prepared, lowered = prepare(config, num_processes=2)
    assert len(dict(prepared.programs())) == 8
    assert not lowered and "lowered in this process" not in caplog.text
    # One that cannot even start: what it should have done is done here.
    caplog.set_level(logging.WARNING)
    processes = LoweringProcesses(1, ["/bin/false"])
    prepared, lowered = prepare(replace(config, masked=True), num_processes=1, processes=processes)
    assert len(dict(prepared.programs())) == 9
    assert lowered and "lowered in this process: in another one: the process died" in caplog.text


def test_a_program_is_kept_before_it_may_run(prepare, config: RunnerConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """XLA serializes no sort of a CPU that has run."""
    kept: list[ProgramKey] = []

    def keep(self: Any, blueprint: Blueprint, key: ProgramKey, program: Program, compiled: Compiled) -> None:
        time.sleep(0.05)
        kept.append(key)

    monkeypatch.setattr(preparation.Executables, "keep", keep)
    monkeypatch.setattr(preparation.CacheHits, "take", lambda self: False)
    prepared, _ = prepare(replace(config, compilation_cache_dir=str(tmp_path)))
    for key, _ in prepared.programs():
        assert key in kept


def test_no_program_is_compiled_before_all_kernels(prepare, config: RunnerConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU."""
    told: list[str] = []
    compiled_once = preparation.compile_lowered

    def compile_told(lowered: bytes, program: Program, mesh: Mesh) -> Compiled:
        told.append("program")
        return compiled_once(lowered, program, mesh)

    monkeypatch.setattr(preparation, "may_have_kernels", lambda device: True)
    monkeypatch.setattr(kernel_compilation, "mosaic_calls", lambda lowered: told.append("kernels") or [])
    monkeypatch.setattr(preparation, "compile_lowered", compile_told)
    prepared, _ = prepare(replace(config, compilation_cache_dir=str(tmp_path)))
    count = len(dict(prepared.programs()))
    assert told == ["kernels"] * count + ["program"] * count


def test_lowering_processes_end_with_whom_they_lower_for():
    processes = LoweringProcesses(2)
    with contextlib.suppress(OSError):
        for lines in processes._lines:
            lines.close()
    assert processes._process.wait() == 0  # which waits for those that it forked
    with pytest.raises(LoweringFailed, match="the process died"):
        processes.lower("", "", Path(), "")
    processes.close()


def test_any_edit_of_a_source_counts(tmp_path: Path):
    package = tmp_path / "jaxserve"
    shutil.copytree(Path(jaxserve.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    before = digest_sources(package)
    assert before == digest_sources(Path(jaxserve.__file__).parent)
    for edited in ("models/rope.py", "pallas_kernels/paged_attention/api.py", "request.py"):
        text = (package / edited).read_text()
        (package / edited).write_text(text + "\n")
        assert digest_sources(package) != before
        (package / edited).write_text(text)


def test_a_blueprint_travels():
    model = ModelConfig.from_hf({**LLAMA, "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "max_window_layers": 0})
    config = RunnerConfig(8, 64)
    plan = plan_kv_cache(model, config, 1, jnp.dtype(jnp.bfloat16), 1 << 30)
    blueprint = Blueprint.of(Architecture.of(model, "xla"), jnp.dtype(jnp.bfloat16), make_mesh(1), plan, config)
    assert Blueprint.from_json(blueprint.to_json()) == blueprint
    assert blueprint.digest("a") != blueprint.digest("b") != replace(blueprint, num_slots=9).digest("b")


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend")
@pytest.mark.parametrize("kv_dtype", ["float16", "float8_e4m3fn"])
def test_programs_for_a_gpu_are_lowered_where_there_is_none(kv_dtype: str):
    model, config = ModelConfig.from_hf(LLAMA), RunnerConfig(16, 64)
    if kv_dtype != "float16":
        model = replace(model, kv_scaling=KVScaling(names=("self_attn.k_scale", "self_attn.v_scale")))
    plan = plan_kv_cache(model, config, 1, jnp.dtype(kv_dtype), 1 << 30)
    here = Blueprint.of(Architecture.of(model), jnp.dtype(jnp.bfloat16), make_mesh(1), plan, config)
    blueprint = replace(here, **H200)
    programs = Programs(blueprint)
    exported = export.deserialize(bytearray(lower(programs[FORWARD], blueprint.platform)))
    assert exported.platforms == ("cuda",)
    assert any(call in exported.mlir_module() for call in ("mosaic_gpu", "__gpu$xla.gpu.triton"))
    assert ("f8E4M3FN" in exported.mlir_module()) == (kv_dtype != "float16")


def test_what_a_device_holds_decides_which_steps_are_one_program():
    shape = dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8)
    model, config = ModelConfig.from_hf({**LLAMA, **shape, "head_dim": 128}), RunnerConfig(256, 1024)
    plan = plan_kv_cache(model, config, 1, jnp.dtype(jnp.bfloat16), 1 << 30)
    most = {}
    for num_shards in (1, 4):
        blueprint = Blueprint.of(Architecture.of(model), jnp.dtype(jnp.bfloat16), make_mesh(num_shards), plan, config)
        most[num_shards] = Programs(replace(blueprint, **H200)).buckets.whole[-1].num_rows
    assert most == {1: 8, 4: 64}  # 13 GB of weights, cut over four devices


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend")
def test_gpus_that_pallas_does_not_know_are_lowered_for_as_others_of_their_kind():
    for capability, kind in KNOWN_GPUS.items():
        version = gpu_version_from_device_kind(kind)
        assert version is not None and get_gpu_info_from_version(version).arch_name == capability
    l40s, *others = (
        SimpleNamespace(platform="gpu" if capability else "cpu", device_kind=kind, compute_capability=capability)
        for kind, capability in (("NVIDIA L40S", "8.9"), ("NVIDIA H200", "9.0"), ("MI300", "gfx942"), ("cpu", ""))
    )
    assert lowered_kind(l40s) == "NVIDIA L4" and [*map(lowered_kind, others)] == ["NVIDIA H200", "MI300", "cpu"]
    model, config = ModelConfig.from_hf(LLAMA), RunnerConfig(16, 64)
    plan = plan_kv_cache(model, config, 1, jnp.dtype(jnp.float16), 1 << 30)
    here = Blueprint.of(Architecture.of(model), jnp.dtype(jnp.bfloat16), make_mesh(1), plan, config)
    program = Programs(replace(here, **{**H200, "device_kind": lowered_kind(l40s), "num_cores": 142}))[FORWARD]
    assert "__gpu$xla.gpu.triton" in export.deserialize(bytearray(lower(program, "cuda"))).mlir_module()


def test_what_is_lowered_for_another_kind_of_device_runs():
    model, config = ModelConfig.from_hf(LLAMA), RunnerConfig(16, 64)
    plan = plan_kv_cache(model, config, 1, jnp.dtype(jnp.float32), 1 << 20)
    here = Blueprint.of(Architecture.of(model), jnp.dtype(jnp.float32), make_mesh(1), plan, config)
    program = Programs(replace(here, device_kind="another"))[FORWARD]
    compiled = compile_lowered(lower(program, "cpu"), program, make_mesh(1))
    arguments = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), program.arguments)
    assert jax.tree.structure(compiled(*arguments)) == jax.tree.structure(program.results)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend")
def test_gpus_that_reach_each_other_take_the_table_of_peers():
    model, config = ModelConfig.from_hf(LLAMA), RunnerConfig(16, 64)
    plan = plan_kv_cache(model, config, 2, jnp.dtype(jnp.float16), 1 << 30)
    here = Blueprint.of(Architecture.of(model), jnp.dtype(jnp.bfloat16), make_mesh(2), plan, config)
    assert not here.peer_memory
    texts = []
    for peer_memory in (False, True):
        program = Programs(replace(here, **H200, peer_memory=peer_memory))[FORWARD]
        assert len(program.arguments) == 3 + peer_memory
        texts.append(export.deserialize(bytearray(lower(program, "cuda"))).mlir_module())
    # Of a layer two sums, of the embeddings' and the last layer's one each; functions are written once.
    assert [text.count("stablehlo.all_reduce") > 0 for text in texts] == [True, False]
    assert [text.count('name = "all_reduce') > 0 for text in texts] == [False, True]


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend")
def test_shards_that_no_kernel_takes_of_a_matrix_that_one_takes():
    # Codes of 4 bits with a scale a row: 768 columns would be packed in blocks of 128, 192 on each of four GPUs are not.
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": -1}
    model = ModelConfig.from_hf({**LLAMA, "intermediate_size": 768, "quantization_config": quantization})
    config = RunnerConfig(16, 64)
    plan = plan_kv_cache(model, config, 4, jnp.dtype(jnp.float16), 1 << 30)
    here = Blueprint.of(Architecture.of(model), jnp.dtype(jnp.bfloat16), make_mesh(4), plan, config)
    exported = export.deserialize(bytearray(lower(Programs(replace(here, **H200))[FORWARD], "cuda")))
    assert {"uint8", "uint16"} <= {str(argument.dtype) for argument in exported.in_avals}


def test_a_store_takes_nothing_that_it_did_not_write(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    store = ProgramStore(tmp_path / "folder")
    assert store.read("a") is None
    store.write("a", b"data")
    assert store.read("a") == b"data" and [path.name for path in (tmp_path / "folder").iterdir()] == ["a"]
    (tmp_path / "folder" / "b").write_bytes(b"")
    assert store.read("b") is None
    (tmp_path / "file").write_text("")
    ProgramStore(tmp_path / "file").write("a", b"data")
    assert "not kept" in caplog.text


def test_a_store_deletes_what_nobody_uses(tmp_path: Path):
    def use_hours_ago(hours: float, *names: str) -> None:
        then = now - 3600 * hours
        for name in names:
            os.utime(tmp_path / name, (then, then))

    def names() -> set[str]:
        return {path.name for path in tmp_path.iterdir() if not path.name.startswith("prepared")}

    now, size = time.time(), 132  # a digest of 32 bytes is in it
    earlier = ProgramStore(tmp_path)
    for name in "abcdefg":
        earlier.write(name, b"1" * 100)
    (tmp_path / "h.12345").write_bytes(b"a writer died")
    use_hours_ago(0, "g")
    use_hours_ago(2, "e")
    use_hours_ago(3, "f")
    use_hours_ago(4, "a", "b", "c", "d")
    ProgramStore(tmp_path).keep_used(since=now - 3600 * 3)  # `jaxserve compile` made e, f and g
    use_hours_ago(50, "e", "f", "h.12345")
    use_hours_ago(5, "c")
    store = ProgramStore(tmp_path)
    assert store.has("a") and not store.has("x")
    store.clean(1 << 20)
    assert names() == set("abcdefg")  # all but what is half written
    beside = sum(path.stat().st_size for path in tmp_path.glob("prepared*"))
    store.clean(6 * size + beside)
    assert names() == set("abdefg")
    ProgramStore(tmp_path).clean(0)  # another process: a was used within the hour
    assert names() == set("aefg")
    use_hours_ago(6, "a")
    store.clean(0)  # in use here
    ProgramStore(tmp_path / "missing").clean(0)
    ProgramStore(None).clean(0)
    assert names() == set("aefg") and store.read("a") == b"1" * 100


def test_a_start_leaves_what_it_uses(prepare, monkeypatch: pytest.MonkeyPatch, config: RunnerConfig):
    monkeypatch.setattr(preparation, "_MOST_EXECUTABLES", 0)
    monkeypatch.setattr(preparation, "_MOST_LOWERED", 0)
    folders = [Path(config.compilation_cache_dir or "") / name for name in (EXECUTABLES_FOLDER, LOWERED_FOLDER)]
    for folder in folders:
        folder.mkdir(exist_ok=True)
        (folder / "of_an_older_version").write_bytes(b"")
        for path in folder.iterdir():
            os.utime(path, (1e9, 1e9))
    prepared, _ = prepare(config)
    count = len(dict(prepared.programs()))
    kept = [{path.name for path in folder.iterdir()} for folder in folders]
    assert [len(names) for names in kept] == [count, count + 1]  # beside the lowered ones lie the bytes of temporaries
    assert not any("of_an_older_version" in names for names in kept)
