"""Benchmarks that run on a GPU: what they call their rows, and what they count, on a tiny model and the CPU."""

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from engines import tiny_runner
from quantized_models import made_dense
from tiny_models import CONFIGS

from benchmarks.compiled_products import CALLS, check_products
from benchmarks.device_bytes import bytes_an_element, schemes
from benchmarks.engine import Measurement, name_parts
from benchmarks.quantized_model import quantized_model
from benchmarks.random_traffic import has_error
from benchmarks.rows import Rows
from benchmarks.sampled_steps import CASES, Card, Steps, Turn, table
from benchmarks.start_http import timeline
from benchmarks.throughput import Run, row_name
from jaxserve.config import ModelOptions
from jaxserve.runner import make_mesh
from jaxserve.tokenizer.gguf import load_gguf_tokenizer
from jaxserve.weights import ModelSource
from jaxserve.weights.loader import open_model


class InstantLLM:
    """An LLM that answers at once, with two tokens in turns."""

    info = SimpleNamespace(vocab_size=100)

    def __init__(self):
        self._num_steps = 0
        self.engines = [self]

    def stats(self) -> Any:
        return SimpleNamespace(num_steps=self._num_steps, schedule_seconds=0.0, dispatch_seconds=0.0, collect_seconds=0.0)

    def generate(self, prompts: list[list[int]], params: Any) -> list[Any]:
        self._num_steps += params.max_tokens
        outputs = [SimpleNamespace(token_ids=[(i + step) % 2 for step in range(params.max_tokens)]) for i in range(len(prompts))]
        return [SimpleNamespace(outputs=[output]) for output in outputs]


@pytest.mark.parametrize(
    "quantize, label, tensor_size, names",
    [
        ("fp8", "", 1, {"fp8_decode_step_b1_ms", "fp8_decode_step_b64_ms", "fp8_prefill_64x2048_tok_s"}),
        ("w4", "", 1, {"w4_decode_step_b1_ms", "w4_decode_step_b64_ms", "w4_prefill_64x2048_tok_s"}),
        (None, "1b", 1, {"decode_step_1b_b1_ms", "decode_step_1b_b64_ms", "prefill_1b_64x2048_tok_s"}),
        ("fp8", "8b", 4, {"tp4_fp8_8b_decode_step_b1_ms", "tp4_fp8_8b_decode_step_b64_ms", "tp4_fp8_8b_prefill_64x2048_tok_s"}),
        (None, "8b", 2, {"tp2_8b_decode_step_b1_ms", "tp2_8b_decode_step_b64_ms", "tp2_8b_prefill_64x2048_tok_s"}),
    ],
)
def test_rows_of_the_engine(quantize: str | None, label: str, tensor_size: int, names: set[str]):
    rows = Rows(None, "", "cpu")
    measurement = Measurement(InstantLLM(), rows, *name_parts(quantize, label, tensor_size), 4, 3, 1)  # type: ignore[arg-type]
    for count in (1, 64):
        measurement.decode(count)
    measurement.prefill(64, 2048)
    outputs = {name.replace("decode_step", "output").replace("_ms", "_tok_s") for name in names if "decode_step" in name}
    assert {row["name"] for row in rows.added} == names | outputs


def test_a_decode_step_is_left_out_where_prompts_take_too_long(capsys: pytest.CaptureFixture[str]):
    """Of an engine that computes a prompt a step; of 4 requests with 7 tokens too few steps have all of them."""

    class SlowLLM(InstantLLM):
        def generate(self, prompts: list[list[int]], params: Any) -> list[Any]:
            self._num_steps += len(prompts) - 1
            return super().generate(prompts, params)

    rows = Rows(None, "", "cpu")
    measurement = Measurement(SlowLLM(), rows, "", "", 4, 7, 2)  # type: ignore[arg-type]
    for count in (3, 4):
        measurement.decode(count)
    assert [row["name"] for row in rows.added] == [
        "output_b3_tok_s",
        "decode_step_b3_ms",
        "output_b4_tok_s",
    ] and "B=4: left out" in capsys.readouterr().out


@pytest.mark.parametrize(
    "answer, wrong",
    [
        (b'{"choices": [{"logprobs": {"top_logprobs": [{"error": -1.5}]}}], "usage": {}}', False),
        (b'data: {"choices": [{"text": "\\"error\\":"}]}\n\ndata: [DONE]\n\n', False),
        (b'data: {"choices": []}\n\ndata: {"error": {"message": "gone"}}\n\ndata: [DONE]\n\n', True),
        (b'data:{"error": "gone", "error_type": "generation"}\n\n', True),
        (b'[{"generated_text": "x"}]', False),
    ],
)
def test_an_error_is_an_object_and_no_token(answer: bytes, wrong: bool):
    assert has_error(answer) is wrong


def test_row_of_the_throughput():
    assert row_name("fp8", "", 1000, 1000) == "fp8_1000_1000_tok_s"
    assert row_name(None, "1b", 1000, 10) == "1b_1000_10_tok_s"


@pytest.mark.parametrize(
    "quantize, code",
    [("fp8", "fp8"), ("w4", "int4"), ("w8", "int8"), ("fp8_blocks", "fp8"), ("mxfp4", "e2m1"), ("bitsandbytes-nf4", "nf4"), (None, None)],
)
def test_quantized_shapes(quantize: str | None, code: str | None, tmp_path: Path):
    config = {**CONFIGS["llama"], "hidden_size": 256, "intermediate_size": 512}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with quantized_model(tmp_path, quantize) as (folder, options):
        source = ModelSource("random", "", folder, quantize=options.pop("quantize", None))
        opened = open_model(source, ModelOptions(**options), make_mesh(1))
    schemes = opened.architecture.config.quantization.schemes
    assert [scheme.layout.code for scheme in schemes] == ([code] if code else [])
    if code == "int4":
        assert schemes[0].group == 128 and schemes[0].layout.correction == "none"


def test_a_gguf_file_of_a_shape_serves_random_weights(tmp_path: Path):
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    (tmp_path / "config.json").write_text(json.dumps({**CONFIGS["llama"], **shape, "bos_token_id": 1, "eos_token_id": 2}))
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}}))
    with quantized_model(tmp_path, "q4_k_m") as (file, options):
        opened = open_model(ModelSource("random", "", file), ModelOptions(**options), make_mesh(1))
        assert opened.architecture.config.quantization.description == "gguf (Q4_K, Q6_K)"
        assert load_gguf_tokenizer(file).encode("ab", add_special_tokens=False) == [2]
        matrices = [leaf for leaf in made_dense(opened.load(make_mesh(1)), make_mesh(1)).leaves if leaf.ndim == 2]
    deviations = [float(leaf.std()) for leaf in matrices]
    # With a mean every layer would add to one direction, until all prompts have one answer.
    assert all(abs(float(leaf.mean())) < 4 * leaf.size**-0.5 * deviation for leaf, deviation in zip(matrices, deviations, strict=True))
    assert deviations == pytest.approx([1e-3 / 3**0.5] * len(deviations), rel=0.15)


def test_throughput_counts_each_token(tiny_checkpoint: Callable[[str], Path]):
    engine = tiny_runner(tiny_checkpoint("llama")).engine(prefix_caching=False)
    run = Run(engine, 20, 6)
    tokens, seconds = run.measure(7, 60.0)
    assert tokens == 42 and seconds > 0
    # At the time's end the others are left, and nothing stays behind.
    tokens, _ = run.measure(7, 1e-9)
    assert tokens == 0 and not engine.has_work
    assert run.measure(2, 60.0)[0] == 12
    engine.check_integrity()


def test_steps_of_each_option(tiny_checkpoint: Callable[[str], Path]):
    engine = tiny_runner(tiny_checkpoint("llama")).engine(prefix_caching=True)
    steps, turns = Steps(engine, Card(), 3, 20, 2, 4), {name: Turn() for name in ("greedy", "one token", "own token")}
    for name, turn in turns.items():
        steps.run(CASES[name], turn)
        assert len(turn.steps) == len(turn.different) == 4 and not engine.has_work
    assert turns["one token"].different == [1] * 4 and turns["own token"].different == [3] * 4
    assert [line.split("  ")[0] for line in table(turns).splitlines()] == ["case", *turns]


@pytest.mark.parametrize(
    "name, expected", [("gptq_g128", 0.5 + 2 / 128), ("on_load_fp8", 1 + 4 / 512), ("q4_1", 0.5 + 4 / 32), ("mxfp4", 0.5 + 2 / 32)]
)
def test_bytes_an_element(name: str, expected: float):
    assert bytes_an_element(schemes()[name], 256, 512) == pytest.approx(expected)


def test_a_servers_log_becomes_a_timeline():
    begin = datetime(2026, 11, 23, 1, 2, 3).timestamp()
    log = "2026-11-23 01:02:04,250 INFO jaxserve.engine.start[7]: devices\nWARNING of a library\n"
    assert timeline(log, begin) == ["  1.25 engine.start[7]: devices", "WARNING of a library"]


def compiled(dtype: str, before: str = "", target: str | None = None) -> str:
    """As XLA's compiler for GPUs writes it (jax 0.11.2), but for what `compiled_products` does not look at."""
    kind, reads = {"float8_e4m3fn": "f8e4m3fn", "int8": "s8"}[dtype], "%bitcast.6.0" if before else "%w.1"
    target = target or CALLS[dtype]
    return f"""HloModule jit_multiply, entry_computation_layout={{(bf16[512,4096]{{1,0}}, {kind}[6144,4096]{{1,0}})->bf16[512,6144]{{1,0}}}}

ENTRY %main.4 (x.1: bf16[512,4096], w.1: {kind}[6144,4096], scales.1: f32[1,6144]) -> bf16[512,6144] {{
  %w.1 = {kind}[6144,4096]{{1,0}} parameter(1), sharding={{replicated}}
  %x.2 = {kind}[512,4096]{{1,0}} fusion(%x.1, %input_reduce_fusion), kind=kLoop, calls=%fused_convert.1
{before.replace("KIND", kind)}  %gemm.1 = (f32[512,6144]{{1,0}}, s8[0]{{0}}) custom-call(%x.2, {reads}), custom_call_target="{target}"
}}
"""


def test_a_weight_that_the_compiler_moves_is_told():
    said: list[str] = []
    assert check_products(lambda _, x, weight: compiled(weight.codes.dtype.name), list(CALLS), said.append)
    assert len(said) == 4 and said[0].endswith(": __cublas$lt$matmul$f8")
    transposed = "  %moved = KIND[4096,6144]{1,0} fusion(%w.1), kind=kInput\n  %bitcast.6.0 = KIND[6144,4096]{0,1} bitcast(%moved)\n"
    assert not check_products(lambda _, x, weight: compiled(weight.codes.dtype.name, transposed), list(CALLS), said.append)
    assert "moved is a fusion of the weight's shape" in said[-1] and "does not read the weight's parameter" in said[-1]
    gemm = "__cublas$gemm"
    assert not check_products(lambda _, x, weight: compiled(weight.codes.dtype.name, target=gemm), list(CALLS), said.append)
    assert said[-1] == f"int8 quantized_matmul_parts: calls of cuBLAS: ['{gemm}'], not __cublas$lt$matmul"
