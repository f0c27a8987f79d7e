"""Under load every request gets the tokens that transformers gives it alone, through chunked prefill, preemption, prefix hits and aborts,
on every mesh."""

from collections.abc import Callable
from pathlib import Path

import pytest
from engines import FEW_PROGRAMS, TinyRunner, finish, greedy, load_goldens, tiny_runner, tokens_of

from jaxserve.engine.engine import Engine
from jaxserve.request import Request


@pytest.fixture(scope="module")
def runner(tiny_checkpoint: Callable[[str], Path]) -> TinyRunner:
    return tiny_runner(tiny_checkpoint("llama"))


def check_under_load(engine: Engine, name: str = "llama", preempts: bool = True) -> None:
    """Send everything at once, some of it twice, abort strangers in between, and compare with the goldens."""
    prompts, alone = load_goldens(name)
    num_compiled = engine.stats().compile_events  # other tests compile in this process
    strangers = [f"stranger {i}" for i in range(0, len(prompts), 4)]
    expected = {}
    for i in sorted(range(len(prompts)), key=lambda i: len(prompts[i])):  # those of a length run together and grow out of the cache
        prompt = prompts[i]
        params = greedy(len(alone[i]))
        for request_id in [f"{i}", f"{i} again"] if i % 3 == 0 else [f"{i}"]:
            engine.add_request(Request(request_id, tuple(prompt), params))
            expected[request_id] = alone[i]
        if i % 4 == 0:
            engine.add_request(Request(f"stranger {i}", tuple(prompt[::-1] + [5] * 20), params))
    tokens: dict[str, list[int]] = {}
    aborted: set[str] = set()
    num_steps = 0
    while engine.has_work:
        for output in engine.step():
            assert output.request_id not in aborted, "output after an abort"
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
        num_steps += 1
        if num_steps % 9 == 5 and strangers:
            aborted.add(stranger := strangers.pop(0))
            engine.abort(stranger)
    assert {request_id: tokens[request_id] for request_id in expected} == expected
    engine.check_integrity()
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_pages_used) == (0, 0, 0)
    assert stats.num_preemptions > 0 or not preempts, "the cache was meant to be too small"
    assert stats.compile_events == num_compiled


def test_load_changes_no_token(runner: TinyRunner):
    engine = runner.engine(kv_tokens=240)
    check_under_load(engine)
    assert engine.stats().prefix_hits > 0, "prompts were meant to come twice"


def test_load_changes_no_token_without_prefix_cache(runner: TinyRunner):
    check_under_load(runner.engine(kv_tokens=240, prefix_caching=False))


def test_sync_gives_the_same_tokens(runner: TinyRunner):
    check_under_load(runner.engine(kv_tokens=240, sync=True))


def test_bounded_decode_gap_gives_the_same_tokens(runner: TinyRunner):
    check_under_load(runner.engine(kv_tokens=240, max_decode_gap_ms=0.001))


@pytest.mark.parametrize("tensor_size", [2, 4])
def test_tensor_parallel_gives_the_same_tokens(tiny_checkpoint: Callable[[str], Path], tensor_size: int):
    check_under_load(tiny_runner(tiny_checkpoint("llama"), tensor_size=tensor_size, **FEW_PROGRAMS).engine())


def test_two_kv_groups_of_which_one_has_a_window(tiny_checkpoint: Callable[[str], Path]):
    check_under_load(
        tiny_runner(tiny_checkpoint("qwen2-windows"), **{**FEW_PROGRAMS, "kv_tokens": 176}).engine(), "qwen2-windows", preempts=False
    )


def test_samples_of_one_prompt_share_its_pages(runner: TinyRunner):
    """Greedy samples are all alike; the prompt is computed once."""
    engine = runner.engine(kv_tokens=240, prefix_caching=False)
    prompts, alone = load_goldens("llama")
    index = max(range(len(prompts)), key=lambda i: len(prompts[i]) * (len(prompts[i]) % 16 != 0))
    before = engine.stats().useful_tokens
    engine.add_request(Request("n", tuple(prompts[index]), greedy(len(alone[index]), n=4)))
    outputs = finish(engine)
    assert [tokens_of(outputs["n", i]) for i in range(4)] == [alone[index]] * 4
    computed = engine.stats().useful_tokens - before
    assert computed <= len(prompts[index]) + 3 + 4 * len(alone[index])
    engine.check_integrity()
