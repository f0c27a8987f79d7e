"""Under load every request gets the tokens it gets alone, through chunked prefill, preemption, prefix hits and aborts, on every mesh."""

from collections.abc import Callable
from pathlib import Path

import pytest
from engines import NUM_REQUESTS, TinyRunner, finish, greedy, make_prompts, run_alone, tiny_runner, tokens_of

from jaxserve.engine.engine import Engine
from jaxserve.request import Request

OUTPUT_TOKENS = 24
FEW_PROGRAMS = {"slots": 2, "max_batch_tokens": 32}


@pytest.fixture(scope="module")
def runner(tiny_checkpoint: Callable[[str], Path]) -> TinyRunner:
    return tiny_runner(tiny_checkpoint("llama"))


@pytest.fixture(scope="module")
def alone(runner: TinyRunner) -> list[list[int]]:
    """What each prompt yields with the engine to itself and no prefix cache."""
    engine = runner.engine(prefix_caching=False)
    tokens = [run_alone(engine, prompt, greedy(OUTPUT_TOKENS)) for prompt in make_prompts()]
    assert len({token for answer in tokens for token in answer}) > 100, "the goldens could not fail"
    return tokens


def check_under_load(engine: Engine, alone: list[list[int]]) -> None:
    """Send everything at once, abort some strangers in between, and compare."""
    prompts = make_prompts()
    for i, prompt in enumerate(prompts):
        engine.add_request(Request(f"r{i}", prompt, greedy(OUTPUT_TOKENS)))
        if i % 4 == 0:
            engine.add_request(Request(f"stranger{i}", prompt[::-1] + (5,) * 20, greedy(OUTPUT_TOKENS)))
    outputs: dict[str, list[int]] = {}
    strangers = iter(range(0, NUM_REQUESTS, 4))
    for step in range(10_000):
        if not engine.has_work:
            break
        for output in engine.step():
            outputs.setdefault(output.request_id, []).extend(output.token_ids)
        if step % 9 == 5 and (stranger := next(strangers, None)) is not None:
            engine.abort(f"stranger{stranger}")
            outputs.pop(f"stranger{stranger}", None)
            outputs[f"aborted{stranger}"] = []
        assert not any(outputs.get(f"stranger{s}") for s in range(0, NUM_REQUESTS, 4) if f"aborted{s}" in outputs), "output after an abort"
    assert not engine.has_work
    for i, tokens in enumerate(alone):
        assert outputs[f"r{i}"] == tokens, f"request {i}"
    engine.check_integrity()
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_pages_used) == (0, 0, 0)


def test_load_changes_no_token(runner: TinyRunner, alone: list[list[int]]):
    engine = runner.engine()
    check_under_load(engine, alone)
    stats = engine.stats()
    assert stats.num_preemptions > 0, "the cache was meant to be too small"
    assert stats.prefix_hits > 0, "prompts were meant to share a prefix"
    assert stats.compile_events == 0


def test_load_changes_no_token_without_prefix_cache(runner: TinyRunner, alone: list[list[int]]):
    check_under_load(runner.engine(prefix_caching=False), alone)


def test_sync_gives_the_same_tokens(runner: TinyRunner, alone: list[list[int]]):
    check_under_load(runner.engine(sync=True), alone)


def test_bounded_decode_gap_gives_the_same_tokens(runner: TinyRunner, alone: list[list[int]]):
    check_under_load(runner.engine(max_decode_gap_ms=0.001), alone)


@pytest.mark.parametrize("tensor_size", [2, 4])
def test_tensor_parallel_gives_the_same_tokens(tiny_checkpoint: Callable[[str], Path], alone: list[list[int]], tensor_size: int):
    check_under_load(tiny_runner(tiny_checkpoint("llama"), tensor_size=tensor_size, **FEW_PROGRAMS).engine(), alone)


def test_samples_of_one_prompt_share_its_pages(runner: TinyRunner, alone: list[list[int]]):
    """Greedy samples are all alike; the prompt is computed once."""
    engine = runner.engine(prefix_caching=False)
    prompt = make_prompts()[9]
    before = engine.stats().useful_tokens
    engine.add_request(Request("n", prompt, greedy(OUTPUT_TOKENS, n=4)))
    outputs = finish(engine)
    assert [tokens_of(outputs["n", i]) for i in range(4)] == [alone[9]] * 4
    computed = engine.stats().useful_tokens - before
    assert computed <= len(prompt) + 3 + 4 * OUTPUT_TOKENS
    engine.check_integrity()
