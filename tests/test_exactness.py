"""Under load every request gets the tokens that transformers gives it alone, through chunked prefill, preemption, prefix hits and aborts,
on every mesh."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from engines import FEW_PROGRAMS, TinyRunner, finish, greedy, load_goldens, tiny_runner, tokens_of

from jaxserve import LLM
from jaxserve.engine.engine import Engine
from jaxserve.request import Request

TOKEN_BYTES = 2 * 4 * 4 * 8 * 2  # K and V in float32, 4 heads of 8, 2 layers


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


def test_four_shards_give_the_same_tokens(tiny_checkpoint: Callable[[str], Path]):
    check_under_load(tiny_runner(tiny_checkpoint("llama"), tensor_size=4, **FEW_PROGRAMS).engine())


def test_two_shards_and_two_replicas_of_two_shards_give_the_same_tokens(tiny_checkpoint: Callable[[str], Path], tmp_path: Path):
    """As LLM makes them; the replicas, each in a process of its own, find the programs that were compiled here."""
    options = dict(max_batch_size=2, max_batch_prefill_tokens=32, max_total_tokens=240, disable_grammar_support=True)
    options |= dict(cpu_kv_cache_gib=240 * TOKEN_BYTES / 2**30, compilation_cache_dir=str(tmp_path))
    with LLM(str(tiny_checkpoint("llama")), mesh="1x2", **options) as llm:
        check_under_load(llm.engines[0])
    prompts, alone = load_goldens("llama")
    with LLM(str(tiny_checkpoint("llama")), mesh="2x2", **options) as llm:
        outputs = llm.generate(prompts, [greedy(len(tokens)) for tokens in alone])
        assert [output.outputs[0].token_ids for output in outputs] == alone
        deadline = time.monotonic() + 10
        while not all(stats.output_tokens for stats in llm.stats()):  # which come twice a second
            assert time.monotonic() < deadline, "both replicas were meant to work"
            time.sleep(0.05)


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
