"""Safetensors folders: what ends up where, and what is said of a damaged checkpoint."""

import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from free_ports import free_port
from jax.sharding import Mesh
from plain_forward import make_mesh
from safetensors.numpy import load_file, save_file
from tiny_models import CONFIGS, write_checkpoint

from jaxserve.config import ModelOptions
from jaxserve.errors import ModelNotFound, StartupError, UnsupportedModel, WeightsError
from jaxserve.models import Model, ModelConfig
from jaxserve.models.parameters import Parameter
from jaxserve.weights import ModelSource, resolve_model
from jaxserve.weights.loader import load_model, read_config, resolve_dtype
from jaxserve.weights.read_ahead import read_ahead
from jaxserve.weights.safetensors_folder import SafetensorsCheckpoint


def load(folder: Path, tensor: int | Mesh = 1, load_format: str = "auto") -> Model:
    options = ModelOptions(model_id=str(folder), load_format=load_format)
    return load_model(resolve_model(options), options, make_mesh(tensor) if isinstance(tensor, int) else tensor)


def by_name(model: Model) -> dict[str, jax.Array]:
    """Leaves by the name of their first source."""
    pairs = zip(model.architecture.parameters, model.leaves, strict=True)
    return {parameter.sources[0].name: leaf for parameter, leaf in pairs}


def shards(leaf: jax.Array) -> list[np.ndarray]:
    """Local arrays in device order."""
    return [np.asarray(shard.data) for shard in sorted(leaf.addressable_shards, key=lambda shard: shard.device.id)]


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A checkpoint that the test may damage."""
    return write_checkpoint(tmp_path / "llama", "llama")


def rewrite(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    """Change the tensors of a single-file checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_shards_hold_their_heads_units_and_vocabulary(tiny_checkpoint: Callable[[str], Path]) -> None:
    """qwen3-bias has 8 heads of 16 and 2 KV heads: on 4 shards, KV heads 0, 0, 1, 1."""
    folder = tiny_checkpoint("qwen3-bias")
    tensors, leaves = load_file(folder / "model.safetensors"), by_name(load(folder, 4))
    layer = "model.layers.1."
    q, k, v = (tensors[f"{layer}self_attn.{n}_proj.weight"] for n in "qkv")
    gate, up = tensors[f"{layer}mlp.gate_proj.weight"], tensors[f"{layer}mlp.up_proj.weight"]
    biases = [tensors[f"{layer}self_attn.{n}_proj.bias"] for n in "qkv"]
    for i in range(4):
        heads, kv_head, units = slice(32 * i, 32 * i + 32), slice(16 * (i // 2), 16 * (i // 2) + 16), slice(24 * i, 24 * i + 24)
        expected = {
            "self_attn.q_proj.weight": np.concatenate([q[heads], k[kv_head], v[kv_head]]),
            "self_attn.q_proj.bias": np.concatenate([biases[0][heads], biases[1][kv_head], biases[2][kv_head]]),
            "self_attn.o_proj.weight": tensors[f"{layer}self_attn.o_proj.weight"][:, heads],
            "self_attn.o_proj.bias": tensors[f"{layer}self_attn.o_proj.bias"],
            "mlp.gate_proj.weight": np.concatenate([gate[units], up[units]]),
            "mlp.down_proj.weight": tensors[f"{layer}mlp.down_proj.weight"][:, units],
        }
        for name, array in expected.items():
            np.testing.assert_array_equal(shards(leaves[layer + name])[i], array, err_msg=name)
        np.testing.assert_array_equal(shards(leaves["lm_head.weight"])[i], tensors["lm_head.weight"][80 * i : 80 * i + 80])


COUNT = """
import json, sys
import jax
from jaxserve.runner import make_mesh
from jaxserve.weights.safetensors_folder import SafetensorsCheckpoint
from test_weights import Counted, load
folder, port, index = sys.argv[1], sys.argv[2], int(sys.argv[3])
jax.distributed.initialize(f"127.0.0.1:{port}", 2, index, cluster_detection_method="deactivate")
with Counted() as read:
    model = load(folder, make_mesh(4, num_hosts=2))
print(json.dumps([read.nbytes, sum(shard.data.nbytes for leaf in model.leaves for shard in leaf.addressable_shards)]))
"""


class Counted:
    """Counts what is read of safetensors files while the block runs.

    Attributes:
        nbytes: so far.
    """

    def __enter__(self) -> "Counted":
        self.nbytes, self._read = 0, SafetensorsCheckpoint.read
        lock = threading.Lock()

        def read(checkpoint: SafetensorsCheckpoint, name: str, index: tuple[slice, ...]) -> np.ndarray:
            part = self._read(checkpoint, name, index)
            with lock:
                self.nbytes += part.nbytes
            return part

        SafetensorsCheckpoint.read = read  # pyright: ignore[reportAttributeAccessIssue]
        return self

    def __exit__(self, *error: object) -> None:
        SafetensorsCheckpoint.read = self._read


def sizes(folder: Path) -> tuple[int, int]:
    """Bytes of a checkpoint's matrices, and of its vectors, which every device holds."""
    tensors = load_file(folder / "model.safetensors").values()
    matrices = sum(tensor.nbytes for tensor in tensors if tensor.ndim == 2)
    return matrices, sum(tensor.nbytes for tensor in tensors) - matrices


@pytest.mark.parametrize("num_shards", [2, 4])
def test_a_host_reads_each_byte_once(num_shards: int, tiny_checkpoint: Callable[[str], Path]) -> None:
    """However many devices share what it reads."""
    folder = tiny_checkpoint("llama")
    matrices, vectors = sizes(folder)
    with Counted() as read:
        model = load(folder, num_shards)
    assert read.nbytes == matrices + vectors
    held = [sum(array.nbytes for array in of_device) for of_device in zip(*map(shards, model.leaves), strict=True)]
    assert held == [matrices // num_shards + vectors] * num_shards


def test_each_of_two_hosts_reads_its_half(tiny_checkpoint: Callable[[str], Path]) -> None:
    """Neither ever has the whole model: two processes of two devices each."""
    folder = tiny_checkpoint("llama")
    matrices, vectors = sizes(folder)
    flags = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", COUNT, str(folder), str(free_port())]
    hosts = [subprocess.Popen([*command, str(index)], env=flags, stdout=subprocess.PIPE, text=True) for index in range(2)]
    told = [json.loads(host.communicate(timeout=120)[0]) for host in hosts]
    assert told == [[matrices // 2 + vectors, matrices // 2 + 2 * vectors]] * 2


def test_many_files_are_read_as_one(tmp_path: Path, tiny_checkpoint: Callable[[str], Path]) -> None:
    one = load(tiny_checkpoint("qwen2"))
    many = load(write_checkpoint(tmp_path / "sharded", "qwen2", max_shard_tensors=4))
    (tmp_path / "sharded" / "model.safetensors.index.json").unlink()
    unindexed = load(tmp_path / "sharded")
    for leaf, *others in zip(one.leaves, many.leaves, unindexed.leaves, strict=True):
        for other in others:
            np.testing.assert_array_equal(leaf, other)


def test_reading_ahead_keeps_order_and_ends_at_the_first_error() -> None:
    """No more is read than was asked for and the threads hold; what fails is raised in its place, and nothing is read after it."""
    ahead = len(os.sched_getaffinity(0))
    begun: list[int] = []

    def read(item: int) -> int:
        begun.append(item)
        if item == 3:
            raise WeightsError("damaged")
        return 10 * item

    reads = read_ahead(read, range(1000))
    assert [next(reads) for _ in range(3)] == [0, 10, 20]
    with pytest.raises(WeightsError, match="damaged"):
        next(reads)
    assert len(begun) <= 3 + ahead
    with closing(read_ahead(read, range(4, 1000))) as unfinished:
        assert next(unfinished) == 40
    assert max(begun) <= 4 + ahead and not any(thread.name.startswith("read") for thread in threading.enumerate())


def test_half_precision_checkpoints_are_widened_on_the_cpu(llama: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    halves = {name: array.astype(ml_dtypes.bfloat16 if "mlp" in name else np.float16) for name, array in tensors.items()}
    save_file(halves, llama / "model.safetensors")
    model = load(llama)
    assert {leaf.dtype for leaf in model.leaves} == {jnp.dtype(jnp.float32)}
    name = "model.layers.0.mlp.down_proj.weight"
    np.testing.assert_array_equal(by_name(model)[name], halves[name].astype(np.float32))


def test_a_model_in_bfloat16_has_float16_behind_norms(llama: Path) -> None:
    halves = {name: array.astype(ml_dtypes.bfloat16) for name, array in load_file(llama / "model.safetensors").items()}
    save_file(halves, llama / "model.safetensors")
    source = ModelSource("m", "", llama)
    for load_format in ("auto", "dummy"):
        model = load_model(source, ModelOptions(load_format=load_format), make_mesh(4), jnp.dtype(jnp.bfloat16))
        plain = load_model(source, ModelOptions(load_format=load_format), make_mesh(4), jnp.dtype(jnp.float32))
        assert model.kv_dtype == jnp.float16 and plain.kv_dtype == jnp.float32
        for name, leaf in by_name(model).items():
            after_norm = name.endswith(("self_attn.q_proj.weight", "mlp.gate_proj.weight"))
            assert leaf.dtype == (jnp.float16 if after_norm else jnp.bfloat16), name
            # The numbers of a bfloat16 model, whatever they are kept in.
            expected = np.asarray(by_name(plain)[name]).astype(ml_dtypes.bfloat16).astype(np.float32)
            np.testing.assert_allclose(np.asarray(leaf, np.float32), expected, atol=2**-25 if after_norm else 0, rtol=0, err_msg=name)


def changed(folder: Path, name: str, value: float) -> None:
    """Write a number into the middle of a tensor."""
    tensors = load_file(folder / "model.safetensors")
    tensors[name].reshape(-1)[tensors[name].size // 2 + 1] = value
    save_file(tensors, folder / "model.safetensors")


BROKEN = "the checkpoint has elements that are infinite or not numbers (NaN), in "


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_numbers_that_are_none_are_refused_by_the_name_of_their_tensor(dtype: str, llama: Path) -> None:
    """Matrices that are converted on the devices, others, norms, and the head."""
    names = [f"model.layers.1.{name}.weight" for name in ("self_attn.k_proj", "mlp.down_proj", "input_layernorm")]
    options = ModelOptions(model_id=str(llama), dtype=dtype)
    changed(llama, "lm_head.weight", -np.inf)
    with pytest.raises(WeightsError) as caught:
        load_model(resolve_model(options), options, make_mesh(4))
    assert str(caught.value) == BROKEN + "lm_head.weight"
    for name in names:
        changed(llama, name, -np.nan)
    with pytest.raises(WeightsError) as caught:
        load_model(resolve_model(options), options, make_mesh(1))
    message = str(caught.value)
    assert message.startswith(BROKEN) and message.endswith(" and 1 more")
    assert sum(name in message for name in (*names, "lm_head.weight")) == 3


def test_embeddings_that_are_no_numbers_are_told(llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Checkpoints have such rows for tokens that no text has; where the embeddings are the head, every token meets them."""
    name = "model.embed_tokens.weight"
    changed(llama, name, np.nan)
    load(llama)
    assert f"{name} has elements that are infinite or not numbers" in caplog.text
    tied = write_checkpoint(tmp_path / "tied", "qwen2")
    changed(tied, name, np.nan)
    with pytest.raises(WeightsError, match=f"in {name}"):
        load(tied)


def test_numbers_that_a_dtype_cannot_hold(llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Matrices behind norms are float16 in a bfloat16 model: what it cannot hold is its largest, and told. --dtype float16 is refused."""
    gate, down = (f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "down"))
    changed(llama, gate, -1e5)
    source = ModelSource("m", "", llama)
    leaves = by_name(load_model(source, ModelOptions(), make_mesh(2), jnp.dtype(jnp.bfloat16)))
    assert leaves[gate].min() == -65504
    assert f"elements beyond its 65504 became that: up to 100000, in {gate}. --dtype float32 keeps them" in caplog.text
    changed(llama, down, 7e4)
    with pytest.raises(WeightsError, match=rf"has elements that float16 cannot hold: up to 100000, in .*({gate}|{down})"):
        load_model(source, ModelOptions(), make_mesh(1), jnp.dtype(jnp.float16))


def test_dtype_follows_platform_and_checkpoint() -> None:
    config = ModelConfig.from_hf({**CONFIGS["llama"], "torch_dtype": "float16"})
    assert resolve_dtype("auto", config, "cpu") == jnp.float32
    assert resolve_dtype("auto", config, "gpu") == jnp.float16
    assert resolve_dtype("auto", ModelConfig.from_hf(CONFIGS["llama"]), "gpu") == jnp.bfloat16
    assert resolve_dtype("bfloat16", config, "cpu") == jnp.bfloat16


def test_missing_extra_and_misshapen_tensors_are_one_error(llama: Path) -> None:
    def damage(tensors: dict[str, np.ndarray]) -> None:
        for i in range(2):
            del tensors[f"model.layers.{i}.self_attn.q_proj.weight"], tensors[f"model.layers.{i}.mlp.up_proj.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(64, np.float32)
        tensors["model.norm.weight"] = np.zeros(65, np.float32)

    rewrite(llama, damage)
    with pytest.raises(WeightsError) as caught:
        load(llama)
    message = str(caught.value)
    assert "missing: model.layers.0." in message and "and 1 more" in message
    assert "not part of the model: model.layers.0.self_attn.q_proj.bias" in message
    assert "model.norm.weight is [65], not [64]" in message
    assert "\n" not in message


def test_stored_rotary_frequencies_are_ignored(llama: Path) -> None:
    rewrite(llama, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}))
    load(llama)


def test_head_beside_tied_embeddings(tmp_path: Path) -> None:
    """As in transformers: the same values are tied, others are not."""
    folder = write_checkpoint(tmp_path, "qwen2")
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]}))
    assert load(folder).config.tie_embeddings
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] * 2}))
    model = load(folder)
    assert not model.config.tie_embeddings
    np.testing.assert_array_equal(by_name(model)["lm_head.weight"], by_name(model)["model.embed_tokens.weight"] * 2)


def test_mesh_that_cannot_share_the_model(tmp_path: Path, tiny_checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(StartupError, match="3 devices cannot share this model's 8 attention heads evenly"):
        load(tiny_checkpoint("llama"), 3)
    config = {**CONFIGS["llama"], "num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(StartupError, match="6 devices cannot share this model's 4 KV heads evenly"):
        load(tmp_path, 6, "dummy")


def test_random_weights_are_the_same_in_every_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["qwen3"]))
    one, two = by_name(load(tmp_path, 2, "dummy")), by_name(load(tmp_path, 2, "dummy"))
    for name, leaf in one.items():
        np.testing.assert_array_equal(leaf, two[name])
    embedding, norm = np.asarray(one["model.embed_tokens.weight"]), np.asarray(one["model.norm.weight"])
    assert embedding.std() == pytest.approx(1e-3 / 3**0.5, rel=0.02)
    assert abs(embedding.mean()) < 3e-5
    assert not np.array_equal(embedding, np.asarray(one["lm_head.weight"]))
    assert (norm == 1).all()


@pytest.mark.parametrize("num_shards", [2, 4])
def test_random_weights_are_the_same_on_every_mesh(tmp_path: Path, num_shards: int) -> None:
    """Four shards hold each of two KV heads twice."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["qwen2"] | {"vocab_size": 319}))
    one, cut = load(tmp_path, 1, "dummy"), load(tmp_path, num_shards, "dummy")
    whole: dict[str, np.ndarray] = {}
    for parameter, leaf in zip(one.architecture.parameters, one.leaves, strict=True):
        first = 0
        for source in parameter.sources:
            whole[source.name] = np.asarray(leaf)[first : first + source.shape[0]]
            first += source.shape[0]
    for parameter, leaf in zip(cut.architecture.parameters, cut.leaves, strict=True):
        assert isinstance(parameter, Parameter)
        for shard, found in enumerate(shards(leaf)):
            expected = parameter.read(lambda name, index: whole[name][index], shard, num_shards, np.dtype(np.float32))
            axis = parameter.sources[0].axes[0]
            if axis.pad:
                held = axis.bounds(shard, num_shards)
                expected, found = expected[: held.stop - held.start], found[: held.stop - held.start]
            np.testing.assert_array_equal(found, expected, err_msg=parameter.sources[0].name)


@pytest.mark.parametrize("size", [0, 4, 8, 100, 20_000, -1])
def test_truncated_files(llama: Path, size: int) -> None:
    path = llama / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(WeightsError, match=r"model\.safetensors is not a complete safetensors file") as caught:
        load(llama)
    assert "\n" not in str(caught.value)


def test_damaged_headers_never_give_a_traceback(llama: Path) -> None:
    """Bytes of the header changed at random: the file loads, or one line says what is wrong."""
    path = llama / "model.safetensors"
    whole = path.read_bytes()
    header = int.from_bytes(whole[:8], "little") + 8
    draw = random.Random(0)
    errors = 0
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(draw.choice((1, 1, 4, 40))):
            damaged[draw.randrange(header)] = draw.choice((0, 255, ord('"'), ord("9"), ord("}"), draw.randrange(256)))
        path.write_bytes(damaged)
        try:
            load(llama)
        except StartupError as error:
            assert "\n" not in str(error)
            errors += 1
    assert errors > 100


def test_index_files(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "a", "llama", max_shard_tensors=8)
    index = folder / "model.safetensors.index.json"
    good = json.loads(index.read_bytes())
    (folder / "model-00002-of-00003.safetensors").rename(tmp_path / "model-00002-of-00003.safetensors")
    with pytest.raises(WeightsError, match=r"lacks model-00002-of-00003\.safetensors"):
        load(folder)
    # A name that leads out of the folder is looked for within it.
    outside = {k: v.replace("model-00002", "../model-00002") for k, v in good["weight_map"].items()}
    index.write_text(json.dumps({"weight_map": outside}))
    with pytest.raises(WeightsError, match="lacks"):
        load(folder)
    for broken in ("", "{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": [1]}}', '{"weight_map": {"a": 1}}', "[" * 100_000):
        index.write_text(broken)
        with pytest.raises(WeightsError, match="weight_map"):
            load(folder)


def test_integer_weights_are_refused(llama: Path) -> None:
    rewrite(llama, lambda tensors: tensors.update({"model.norm.weight": np.ones(64, np.int8)}))
    with pytest.raises(WeightsError, match=r"model\.norm\.weight has dtype I8"):
        load(llama)


def test_folders_that_are_no_models(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"has no config\.json"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["llama"]))
    with pytest.raises(WeightsError, match="holds no safetensors files"):
        load(tmp_path)
    for broken in ("", "{", "[1]", "\x00", "[" * 100_000):
        (tmp_path / "config.json").write_text(broken)
        with pytest.raises(UnsupportedModel, match="JSON") as caught:
            load(tmp_path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "model_id", ["./nothing", "/nothing/here", "~/nothing", "nothing.gguf", "a/b/c", "", "nothing", "~nobody-here/x", "a\0/b/c", "x" * 5000]
)
def test_paths_that_lead_nowhere(model_id: str) -> None:
    with pytest.raises(ModelNotFound, match="no file or folder"):
        resolve_model(ModelOptions(model_id=model_id))


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(ModelNotFound, match=r"not a \.gguf file"):
        resolve_model(ModelOptions(model_id=str(tmp_path / "weights.bin")))


def test_weights_of_another_folder_and_rope_scaling(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"has no \.safetensors"):
        resolve_model(ModelOptions(model_id=str(llama), weights_cache_override=str(tmp_path)))
    for file in llama.glob("*.safetensors*"):
        (tmp_path / file.name).symlink_to(file)
    source = resolve_model(ModelOptions(model_id=str(llama), weights_cache_override=str(tmp_path), rope_scaling="linear", rope_factor=2.0))
    assert (source.path, source.weights) == (llama, tmp_path)
    plain, scaled = read_config(resolve_model(ModelOptions(model_id=str(llama)))), read_config(source)
    assert scaled.max_position_embeddings == 2 * plain.max_position_embeddings
    assert scaled.rope.frequencies == pytest.approx([frequency / 2 for frequency in plain.rope.frequencies])


def test_folders_of_gguf_files(llama: Path, tmp_path: Path) -> None:
    """One file is the model; of several the user names one, whose name may have spaces and capital letters."""
    folder = tmp_path / "my models.gguf"
    folder.mkdir()
    first = folder / "Tiny Q4_0.GGUF"
    first.write_bytes(b"")
    for model_id in (folder, first):
        source = resolve_model(ModelOptions(model_id=str(model_id)))
        assert source.path == first and source.is_gguf
    (folder / "b.gguf").write_bytes(b"")
    with pytest.raises(ModelNotFound, match=r"has 2 \.gguf files and no config\.json: .* \(Tiny Q4_0\.GGUF, b\.gguf\)"):
        resolve_model(ModelOptions(model_id=str(folder)))
    (folder / "config.json").write_bytes((llama / "config.json").read_bytes())
    source = resolve_model(ModelOptions(model_id=str(folder)))
    assert source.path == folder and not source.is_gguf


def test_source_tells_folder_from_gguf(llama: Path) -> None:
    assert resolve_model(ModelOptions(model_id=str(llama))) == ModelSource(str(llama), "", llama)
    assert ModelSource("x", "", Path("x.gguf")).is_gguf


def test_what_is_no_file_is_not_waited_for(llama: Path, tmp_path: Path) -> None:
    """A pipe that nobody writes to, a link to itself: among the weights, or alone."""
    os.mkfifo(llama / "other.safetensors")
    (llama / "loop.safetensors").symlink_to("loop.safetensors")
    load(llama)
    (llama / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="holds no safetensors files"):
        load(llama)
    os.mkfifo(tmp_path / "model.gguf")
    with pytest.raises(ModelNotFound, match=r"has no config\.json"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["evil\nname\x1b[2J", "x" * 5000])
def test_names_of_a_checkpoint_are_told_in_one_line_that_can_be_printed(name: str, llama: Path) -> None:
    rewrite(llama, lambda tensors: tensors.update({name: np.zeros(3, np.float32)}))
    with pytest.raises(WeightsError, match=r"not part of the model: (evil name|xxx)") as caught:
        load(llama)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 2100
    (llama / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name + "\ud800"}}))
    with pytest.raises(WeightsError, match=r"lacks (evil name|xxx)") as caught:
        load(llama)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 2100
