"""AsyncEngine: permits, aborts, drain, and what becomes of requests when the engine's thread ends."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from engines import Outputs, ended, greedy, tiny_runner

from jaxserve.engine import AsyncEngine, Engine
from jaxserve.errors import ContextTooLong, EngineUnavailable, InvalidRequest, Overloaded
from jaxserve.request import FinishReason, Request, TokenOutput

PERMITS = 3
TIMEOUT = 60.0


@pytest.fixture
def engine(tiny_checkpoint: Callable[[str], Path]) -> Iterator[AsyncEngine]:
    engine = AsyncEngine(tiny_runner(tiny_checkpoint("llama")).engine(), PERMITS)
    yield engine
    engine.close()


def test_every_sink_gets_its_own_outputs_once_a_step(engine: AsyncEngine):
    first, second = Outputs(), Outputs()
    engine.submit(Request("a", (5, 6, 7), greedy(9)), first)
    engine.submit(Request("b", (8, 9), greedy(4, n=2)), second)
    assert {o.request_id for o in first.wait(ended(1))} == {"a"}
    assert {(o.request_id, o.index) for o in second.wait(ended(2))} == {("b", 0), ("b", 1)}
    assert sum(len(o.token_ids) for o in first.all) == 9
    assert [o.finish_reason for o in first.all[:-1]] == [None] * (len(first.all) - 1)
    assert all(len(put) == 2 for put in second.puts[1:-1]), "the samples' outputs of one step come together"


def test_above_the_permits_requests_are_refused_and_permits_come_back(engine: AsyncEngine):
    sink = Outputs()
    for i in range(PERMITS):
        engine.submit(Request(f"r{i}", (5, 6), greedy(200)), sink)
    with pytest.raises(Overloaded):
        engine.submit(Request("one too many", (5, 6), greedy(200)), sink)
    engine.abort("r0")
    engine.submit(Request("fits now", (5, 6), greedy(3)), sink)
    sink.wait(ended(PERMITS))  # r1, r2 and the late one
    assert not any(o.request_id == "r0" and o.finish_reason for o in sink.all)
    assert engine.drain(TIMEOUT) and engine.num_permits_held == 0


def test_one_sample_of_several_can_be_aborted(engine: AsyncEngine):
    sink = Outputs()
    engine.submit(Request("n", (5, 6), greedy(100, n=3)), sink)
    sink.wait(lambda outputs: len(outputs) > 3)
    engine.abort("n", 1)
    sink.wait(ended(2))
    assert {o.index for o in sink.all if o.finish_reason} == {0, 2}
    assert engine.drain(TIMEOUT)


def test_aborted_requests_yield_nothing_more_and_unknown_ones_are_ignored(engine: AsyncEngine):
    sink = Outputs()
    engine.submit(Request("a", (5, 6), greedy(200)), sink)
    sink.wait(lambda outputs: len(outputs) > 2)
    engine.abort("a")
    engine.abort("a")
    engine.abort("never seen")
    count = len(sink.all)
    engine.submit(Request("b", (5, 6), greedy(5)), other := Outputs())
    other.wait(ended(1))
    assert len(sink.all) <= count + 1  # one step's outputs may have been on their way
    assert engine.num_permits_held == 0


def test_bad_requests_are_refused_and_take_no_permit(engine: AsyncEngine):
    sink = Outputs()
    with pytest.raises(InvalidRequest):
        engine.submit(Request("x", (), greedy(5)), sink)
    with pytest.raises(InvalidRequest):
        engine.submit(Request("x", (320,), greedy(5)), sink)
    with pytest.raises(ContextTooLong):
        engine.submit(Request("x", (5,) * 500, greedy(20)), sink)
    engine.submit(Request("x", (5,), greedy(200)), sink)
    with pytest.raises(InvalidRequest):
        engine.submit(Request("x", (5,), greedy(5)), sink)
    assert engine.num_permits_held == 1
    engine.abort("x")


def test_closing_ends_what_runs(engine: AsyncEngine):
    sink = Outputs()
    engine.submit(Request("a", (5, 6), greedy(200, n=2)), sink)
    sink.wait(lambda outputs: len(outputs) > 2)
    engine.close()
    assert [o.finish_reason for o in sink.all].count(FinishReason.ERROR) == 2
    with pytest.raises(EngineUnavailable):
        engine.submit(Request("b", (5, 6), greedy(5)), sink)


def test_a_step_that_raises_ends_every_request_with_its_message(tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch):
    inner = tiny_runner(tiny_checkpoint("llama")).engine()
    engine = AsyncEngine(inner, PERMITS)

    def broken() -> list[TokenOutput]:
        raise RuntimeError("the device fell off")

    monkeypatch.setattr(inner, "step", broken)
    sink = Outputs()
    engine.submit(Request("a", (5, 6), greedy(5)), sink)
    (output,) = sink.wait(ended(1))
    assert output.finish_reason is FinishReason.ERROR and "the device fell off" in output.error
    assert engine.failure is not None and "the device fell off" in engine.failure
    with pytest.raises(EngineUnavailable, match="the device fell off"):
        engine.submit(Request("b", (5, 6), greedy(5)), sink)
    engine.close()


def test_statistics_are_taken_when_asked_for(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch):
    taken = []
    original = Engine.stats
    monkeypatch.setattr(Engine, "stats", lambda self: taken.append(self) or original(self))
    sink = Outputs()
    engine.submit(Request("a", (5, 6, 7), greedy(20)), sink)
    sink.wait(ended(1))
    assert not taken  # 20 steps, and nobody asked
    begin = time.monotonic()
    while (stats := engine.stats()).num_running or stats.num_steps == 0:
        assert time.monotonic() < begin + TIMEOUT
    assert stats.output_tokens == 20 and stats.num_pages_used == 0
    for counts in (stats.schedule_counts, stats.dispatch_counts, stats.device_counts, stats.collect_counts):
        assert sum(counts) == stats.num_steps
    assert stats.device_seconds > 0
