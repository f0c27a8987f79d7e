"""--deterministic: a request's tokens and log probabilities are bitwise those that it gets alone, whatever else runs."""

import functools
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from engines import TinyRunner, finish, load_goldens, tiny_runner
from jax.sharding import PartitionSpec

from jaxserve.config import EngineOptions, ModelOptions
from jaxserve.engine.build import build_engine
from jaxserve.engine.engine import Engine
from jaxserve.errors import DeviceError, StartupError
from jaxserve.grammar import Grammar, GrammarKind
from jaxserve.pallas_kernels.all_reduce.reference import sum_in_order
from jaxserve.request import Request, SamplingParams, TokenOutput
from jaxserve.runner import RunnerConfig, make_mesh, model_runner
from jaxserve.runner.buckets import Bucket, Buckets
from jaxserve.runner.programs import ProgramKey

SIZES = {"slots": 5, "max_batch_tokens": 40, "kv_tokens": 320, "max_total_tokens": 240, "deterministic": True}
# One of each kind that the sampler computes in another way; they meet in the same steps.
PARAMS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 7, "n": 2},
    {"temperature": 0.8, "seed": 8, "top_p": 0.7},
    {"temperature": 0.0, "repetition_penalty": 1.4, "frequency_penalty": 0.3, "min_tokens": 9},
    {"temperature": 1.3, "seed": -9, "top_k": 12, "min_p": 0.01},
    {"temperature": 0.0, "prompt_logprobs": 2, "logit_bias": {5: 1.5}},
    {"temperature": 0.9, "seed": 10, "typical_p": 0.6, "presence_penalty": 0.5},
    {"temperature": 0.0, "n": 2},
    {"temperature": 0.9, "seed": 11, "watermark_gamma": 0.5, "watermark_delta": 2.0},
]


@pytest.fixture(scope="module")
def runner(tiny_checkpoint: Callable[[str], Path]) -> TinyRunner:
    return tiny_runner(tiny_checkpoint("llama"), **SIZES)


def params(number: int, max_tokens: int = 20) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True, logprobs=4, **PARAMS[number % len(PARAMS)])


@functools.cache
def some_requests() -> tuple[Request, ...]:
    """Of all lengths up to 200, so that most come in chunks; every third prompt goes on where another ends."""
    prompts = load_goldens("llama")[0][:24]
    prompts = [[*prompts[i - 1], *prompt][:200] if i % 3 == 2 else prompt for i, prompt in enumerate(prompts)]
    return tuple(Request(f"{i}", tuple(prompt), params(i)) for i, prompt in enumerate(prompts))


def bits(outputs: list[TokenOutput]) -> str:
    """All that a sample was given; floats are told apart by their bits."""
    prompt = [output.prompt_logprobs for output in outputs if output.prompt_logprobs is not None]
    scores = [(scored.raw.tobytes(), scored.ranks.tobytes(), scored.top_token_ids.tobytes(), scored.top_raw.tobytes()) for scored in prompt]
    tokens = [list(itertools.chain(*(getattr(output, name) for output in outputs))) for name in ("token_ids", "logprobs")]
    return repr((tokens, scores, outputs[-1].finish_reason))


@functools.cache
def alone(runner: TinyRunner) -> dict[tuple[str, int], str]:
    """What each request gets from an engine that never served another."""
    found = {}
    for request in some_requests():
        engine = runner.engine()
        engine.add_request(request)
        found |= {key: bits(outputs) for key, outputs in finish(engine).items()}
    return found


def check_crowd(engine: Engine, expected: dict[tuple[str, int], str], requests: list[Request], a_step: int) -> None:
    """Let some requests arrive before each step; nobody's bits change."""
    outputs: dict[tuple[str, int], list[TokenOutput]] = {}
    while requests or engine.has_work:
        arriving, requests = requests[:a_step], requests[a_step:]
        for request in arriving:
            engine.add_request(request)
        for output in engine.step():
            outputs.setdefault((output.request_id, output.index), []).append(output)
    assert set(expected) <= set(outputs)
    different = [key for key, given in expected.items() if bits(outputs[key]) != given]
    assert not different
    engine.check_integrity()


def test_a_crowd_changes_no_bit(runner: TinyRunner):
    engine = runner.engine()
    again = [Request(f"{request.request_id} again", request.prompt_token_ids, request.params) for request in some_requests()]
    crowd = list(itertools.chain(*zip(some_requests(), again, strict=True)))
    expected = alone(runner)
    expected = expected | {(f"{request_id} again", index): given for (request_id, index), given in expected.items()}
    check_crowd(engine, expected, crowd, len(crowd))
    stats = engine.stats()
    assert stats.num_preemptions > 0, "the cache was meant to be too small"
    assert stats.prefix_hits > 0, "prompts were meant to come twice"


def test_another_order_changes_no_bit(runner: TinyRunner):
    engine = runner.engine(prefix_caching=False)
    check_crowd(engine, alone(runner), list(some_requests())[::-1], 1)


def test_constrained_neighbours_change_no_bit(runner: TinyRunner):
    engine = runner.engine(eos_token_ids=(0,), sync=True)
    words = SamplingParams(temperature=1.0, seed=3, max_tokens=12, grammar=Grammar(GrammarKind.REGEX, "[a-z ]+", "regex"))
    strangers = [Request(f"stranger {i}", (9, 8, 7, i), words) for i in range(6)]
    crowd = list(itertools.chain(*itertools.zip_longest(strangers, some_requests()[:9])))
    names = {request.request_id for request in some_requests()[:9]}
    expected = {key: given for key, given in alone(runner).items() if key[0] in names}
    check_crowd(engine, expected, [request for request in crowd if request is not None], 3)


def test_two_shards_and_a_window_change_no_bit(tiny_checkpoint: Callable[[str], Path]):
    runner = tiny_runner(tiny_checkpoint("qwen2-windows"), tensor_size=2, masked=False, **SIZES)
    check_crowd(runner.engine(), alone(runner), list(some_requests()), 2)


@pytest.mark.parametrize("num_tokens", [8, 7])
def test_shards_are_added_up_in_their_order(num_tokens: int):
    """Big and small numbers, so that another order gives another sum."""
    parts = (np.random.default_rng(0).normal(size=(4, num_tokens, 3)) * 10.0 ** np.arange(4)[:, None, None]).astype(np.float32)
    mesh = make_mesh(4)
    split = jax.shard_map(
        lambda x: sum_in_order(x[0], "tensor"), mesh=mesh, in_specs=PartitionSpec("tensor"), out_specs=PartitionSpec(), check_vma=False
    )
    np.testing.assert_array_equal(jax.jit(split)(parts), ((parts[0] + parts[1]) + parts[2]) + parts[3])


def test_a_preempted_sample_keeps_the_seed_that_was_drawn_for_it(runner: TinyRunner):
    """What it draws is what a request with that seed draws alone."""
    engine = runner.engine()
    drawn = SamplingParams(temperature=1.0, max_tokens=60, ignore_eos=True, logprobs=1)
    prompts = [request.prompt_token_ids[:30] for request in some_requests()[8:13]]
    for i, prompt in enumerate(prompts):
        engine.add_request(Request(f"{i}", prompt, drawn))
    seeds = [engine._scheduler._requests[f"{i}"][0].seed for i in range(len(prompts))]
    outputs = finish(engine)
    assert engine.stats().num_preemptions > 0 and len(set(seeds)) == len(seeds)
    for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        engine = runner.engine()
        seeded = SamplingParams(temperature=1.0, seed=seed, max_tokens=60, ignore_eos=True, logprobs=1)
        engine.add_request(Request("alone", prompt, seeded))
        assert bits(finish(engine)["alone", 0]) == bits(outputs[f"{i}", 0])


def test_sizes_of_steps_by_default():
    on_cpu, on_gpu = (RunnerConfig.from_options(EngineOptions(deterministic=True), platform) for platform in ("cpu", "gpu"))
    assert (on_cpu.max_batch_size, on_cpu.common_tokens, on_cpu.max_batch_tokens) == (32, 64, 64)
    assert (on_gpu.max_batch_size, on_gpu.common_tokens, on_gpu.max_batch_tokens) == (256, 512, 1024)
    given = RunnerConfig.from_options(EngineOptions(deterministic=True, max_batch_size=100, max_batch_prefill_tokens=300), "gpu")
    assert (given.common_tokens, given.max_batch_tokens) == (300, 300)


@pytest.mark.parametrize("other", [{"attention": "mosaic"}, {"max_decode_gap_ms": 50.0}])
def test_flags_that_do_not_go_with_it_are_refused(other: dict[str, Any], tiny_checkpoint: Callable[[str], Path]):
    """The second where steps are of one size, as on a CPU."""
    with pytest.raises(StartupError, match="--deterministic"):
        build_engine(ModelOptions(str(tiny_checkpoint("llama"))), EngineOptions(deterministic=True, **other))


def test_a_start_finds_out_that_places_matter(runner: TinyRunner, monkeypatch: pytest.MonkeyPatch):
    """Products are compiled again by other means; if that does not help, nothing is served."""
    device, key = runner.runner, ProgramKey("forward", Bucket(40, 5, False))
    device._check_rows()
    compiled = device._executor._compiled
    right = compiled[key]

    def depends_on_place(*arguments: Any) -> Any:
        state, logits, columns = right(*arguments)
        return state, logits.at[3].multiply(1 + 1e-6), columns

    monkeypatch.setitem(compiled, key, depends_on_place)
    device._check_rows()
    assert compiled[key] is not depends_on_place
    monkeypatch.setitem(compiled, key, depends_on_place)
    monkeypatch.setattr(device._executor._preparation, "compile_again", lambda keys, options: {})
    with pytest.raises(DeviceError, match="--deterministic"):
        device._check_rows()


def test_sizes_that_change_bits_are_given_up(runner: TinyRunner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    device = runner.runner
    monkeypatch.setattr(device, "_buckets", Buckets.deterministic(5, (8, 24, 40, 64)))
    right = {0: {b"right"}, 1: {b"too"}}
    bits = {8: {0: {b"right"}}, 24: right | {1: {b"too", b"other"}}, 40: right, 64: right | {0: {b"wrong"}}}
    monkeypatch.setattr(
        model_runner, "row_bits", lambda *_, num_tokens, **__: bits[num_tokens] if device.step_sizes == (num_tokens,) else {}
    )
    monkeypatch.setattr(device, "_config", replace(device._config, common_tokens=40))
    with caplog.at_level("WARNING"):
        device._check_rows()
    assert device.step_sizes == (8, 40) and "24, 64 tokens" in caplog.text


def test_steps_of_several_sizes_change_no_bit(runner: TinyRunner, tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch):
    """As on a GPU. This CPU's products may differ by size: then the start gives sizes up, or all would fail here."""
    monkeypatch.setattr("jaxserve.models.model.takes_fixed_order", lambda *_: True)
    several = TinyRunner(tiny_checkpoint("llama"), masked=False, **SIZES)
    assert [bucket.num_tokens for bucket in several.runner._executor._preparation.buckets] == [16, 40]
    assert several.runner.step_sizes in ((16, 40), (40,))
    check_crowd(several.engine(), alone(several), list(some_requests()), 2)
