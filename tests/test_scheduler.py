"""The scheduler's promises, one by one. Steps are simulated: every row that samples yields TOKEN unless a test says otherwise."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from jaxserve.errors import ContextTooLong, InvalidRequest, StartupError
from jaxserve.page_changes import PageChanges
from jaxserve.request import FinishReason, Request, SamplingParams, TokenOutput
from jaxserve.runner.buckets import Buckets
from jaxserve.scheduler import KVGroupPages, ScheduledBatch, ScheduledRow, Scheduler, SchedulerConfig
from jaxserve.scheduler.scheduler import MAX_PASSED
from jaxserve.step import StepLogprobs, StepResult

TOKEN = 7
EOS = 0
PAGE_SIZE = 4


def make_scheduler(
    num_pages: int = 64,
    *,
    groups: Sequence[KVGroupPages] | None = None,
    max_batch_size: int = 4,
    max_batch_tokens: int = 64,
    max_total_tokens: int = 100,
    prefix_caching: bool = True,
    bound: Callable[[], int] | int | None = None,
    clock: Callable[[], float] = lambda: 0.0,
) -> Scheduler:
    config = SchedulerConfig(max_batch_size, max_batch_tokens, PAGE_SIZE, max_total_tokens, prefix_caching, frozenset({EOS}), bound)
    return Scheduler(config, groups or [KVGroupPages(num_pages)], clock)


def request(request_id: str, prompt: int | Sequence[int], max_tokens: int | None = 4, **params) -> Request:
    """A prompt given by its length has tokens that no other request's prompt begins with."""
    tokens = tuple(prompt) if not isinstance(prompt, int) else (*map(ord, request_id), *range(100, 200))[:prompt]
    return Request(request_id, tokens, SamplingParams(max_tokens=max_tokens, **params))


def result_of(batch: ScheduledBatch, token: int | Callable[[ScheduledRow], int] = TOKEN) -> StepResult:
    tokens = [[token(row) if callable(token) else token] for row in batch.rows]
    return StepResult(np.array(tokens, np.int32), np.array([int(row.samples) for row in batch.rows], np.int32))


def must_schedule(scheduler: Scheduler) -> ScheduledBatch:
    batch = scheduler.schedule()
    assert batch is not None
    return batch


def step(scheduler: Scheduler, token: int | Callable[[ScheduledRow], int] = TOKEN) -> tuple[ScheduledBatch, list[TokenOutput]]:
    """Schedule and update in turns, as with --sync."""
    batch = must_schedule(scheduler)
    outputs = scheduler.update(batch, result_of(batch, token))
    scheduler.check_integrity()
    return batch, outputs


def run(scheduler: Scheduler, lag: bool = False, most_steps: int = 500) -> tuple[list[ScheduledBatch], list[TokenOutput]]:
    """Run to the end; return every batch and output."""
    batches, outputs, in_flight = [], [], []
    while scheduler.has_work:
        batch = scheduler.schedule()
        if batch is not None:
            batches.append(batch)
            in_flight.append(batch)
        if in_flight and (batch is None or len(in_flight) > lag):
            collected = in_flight.pop(0)
            outputs += scheduler.update(collected, result_of(collected))
        scheduler.check_integrity()
        assert len(batches) < most_steps
    return batches, outputs


def shape(batch: ScheduledBatch) -> list[tuple[str, int, int]]:
    return [(row.sample.request.request_id, row.start, row.num_tokens) for row in batch.rows]


# What a step computes


def test_a_prompt_is_computed_in_chunks_and_only_the_last_samples():
    scheduler = make_scheduler(max_batch_tokens=8)
    scheduler.add(request("a", 20, 3), 0.0)
    batches, outputs = run(scheduler)
    assert [shape(batch) for batch in batches] == [[("a", 0, 8)], [("a", 8, 8)], [("a", 16, 4)], [("a", 20, 1)], [("a", 21, 1)]]
    rows = [batch.rows[0] for batch in batches]
    assert [row.samples for row in rows] == [False, False, True, True, True]
    assert [row.new_slot for row in rows] == [True, False, False, False, False]
    assert [row.num_output_tokens for row in rows] == [0, 0, 0, 1, 2]
    assert [token for row in rows for token in row.token_ids] == [*request("a", 20).prompt_token_ids, TOKEN, TOKEN]
    assert [output.token_ids for output in outputs] == [[TOKEN]] * 3
    assert [output.finish_reason for output in outputs] == [None, None, FinishReason.LENGTH]


def test_decodes_come_first_and_run_in_every_step_while_prompts_arrive():
    scheduler = make_scheduler(max_batch_tokens=16, max_total_tokens=100)
    scheduler.add(request("a", 3, 20), 0.0)
    step(scheduler)
    for i in range(3):
        scheduler.add(request(f"b{i}", 30, 2), 0.0)
    for i in range(6):
        batch, _ = step(scheduler)
        assert shape(batch)[0] == ("a", 3 + i, 1)
        assert batch.num_tokens == 16
        assert [row.num_tokens > 1 for row in batch.rows] == sorted(row.num_tokens > 1 for row in batch.rows)


def test_the_earliest_prompt_gets_the_budget_first():
    scheduler = make_scheduler(max_batch_tokens=16)
    scheduler.add(request("a", 20), 0.0)
    scheduler.add(request("b", 20), 0.0)
    assert shape(step(scheduler)[0]) == [("a", 0, 16)]
    assert shape(step(scheduler)[0]) == [("a", 16, 4), ("b", 0, 12)]


def test_short_prompts_do_not_wait_for_long_ones_that_are_scored():
    """A quarter of the budget is held for them, as long as there are any; prompts that are not scored are served as they come."""
    scheduler = make_scheduler(max_batch_tokens=16, max_batch_size=8)
    for name in "ab":
        scheduler.add(request(name, 40, prompt_logprobs=1), 0.0)
    assert shape(step(scheduler)[0]) == [("a", 0, 16)]
    for name in "cde":
        scheduler.add(request(name, 3, 1), 0.0)
    scheduler.add(request("f", 5, 1), 0.0)  # more than a quarter
    taken = [set(shape(step(scheduler)[0])) for _ in range(3)]
    assert taken[0] == {("a", 16, 12), ("c", 0, 3), ("d", 0, 1)}
    assert taken[1] == {("a", 28, 12), ("d", 1, 2), ("e", 0, 2)}
    assert taken[2] >= {("e", 2, 1), ("b", 0, 14)}  # and a decodes
    scheduler = make_scheduler(max_batch_tokens=16, max_batch_size=8)
    scheduler.add(request("a", 40), 0.0)
    scheduler.add(request("b", 3), 0.0)
    assert shape(step(scheduler)[0]) == [("a", 0, 16)]


def test_nothing_is_held_for_a_short_prompt_that_cannot_run():
    scheduler = make_scheduler(max_batch_tokens=16, max_batch_size=8, num_pages=14)
    scheduler.add(request("a", 40, prompt_logprobs=0), 0.0)
    scheduler.add(request("b", 3), 0.0, ready=False)
    assert shape(step(scheduler)[0]) == [("a", 0, 16)]
    scheduler.add(request("c", 3), 0.0)
    scheduler._waiting[1].lacking = (0, 999)
    assert shape(step(scheduler)[0]) == [("a", 16, 16)]
    scheduler = make_scheduler(max_batch_tokens=16, max_batch_size=1)
    scheduler.add(request("a", 40, prompt_logprobs=0), 0.0)
    scheduler.add(request("b", 3), 0.0)
    assert shape(step(scheduler)[0]) == [("a", 0, 16)]


@pytest.mark.parametrize("bound", [5, lambda: 5])
def test_prefill_is_bounded_while_others_decode_and_only_then(bound: Callable[[], int] | int):
    scheduler = make_scheduler(max_batch_tokens=32, bound=bound)
    scheduler.add(request("a", 20, 3), 0.0)
    assert shape(step(scheduler)[0]) == [("a", 0, 20)]
    scheduler.add(request("b", 20), 0.0)
    assert shape(step(scheduler)[0]) == [("a", 20, 1), ("b", 0, 5)]
    assert shape(step(scheduler)[0]) == [("a", 21, 1), ("b", 5, 5)]
    assert shape(step(scheduler)[0]) == [("b", 10, 10)]


def test_a_bound_of_nothing_still_makes_progress():
    scheduler = make_scheduler(bound=lambda: 0)
    scheduler.add(request("a", 3, 50), 0.0)
    step(scheduler)
    scheduler.add(request("b", 5), 0.0)
    assert shape(step(scheduler)[0])[1:] == [("b", 0, 1)]


def test_a_budget_smaller_than_the_batch_is_refused():
    with pytest.raises(StartupError, match="must hold one token of each running request"):
        make_scheduler(max_batch_size=8, max_batch_tokens=7)


# One step of lag


def test_a_token_in_flight_is_scheduled_by_count():
    scheduler = make_scheduler()
    scheduler.add(request("a", 5, 9), 0.0)
    first = must_schedule(scheduler)
    second = must_schedule(scheduler)
    assert shape(second) == [("a", 5, 1)] and list(second.rows[0].token_ids) == [-1] and second.rows[0].num_output_tokens == 1
    scheduler.update(first, result_of(first))
    third = must_schedule(scheduler)
    assert list(third.rows[0].token_ids) == [-1] and third.rows[0].num_output_tokens == 2


def test_a_length_is_known_by_count_so_that_no_step_is_wasted():
    scheduler = make_scheduler()
    scheduler.add(request("a", 5, 3), 0.0)
    batches, outputs = run(scheduler, lag=True)
    assert [shape(batch) for batch in batches] == [[("a", 0, 5)], [("a", 5, 1)], [("a", 6, 1)]]
    assert len(outputs) == 3 and outputs[-1].finish_reason is FinishReason.LENGTH


def test_a_token_after_the_end_is_dropped_and_counted_nowhere():
    scheduler = make_scheduler()
    scheduler.add(request("a", 5, 9), 0.0)
    first, second = must_schedule(scheduler), must_schedule(scheduler)
    (output,) = scheduler.update(first, result_of(first, EOS))
    assert (output.token_ids, output.finish_reason) == ([EOS], FinishReason.EOS)
    assert scheduler.has_work
    assert scheduler.schedule() is None
    assert scheduler.update(second, result_of(second)) == []
    assert not scheduler.has_work and scheduler.stats()["output_tokens"] == 1


def test_slot_and_pages_are_given_back_once_no_step_holds_them():
    scheduler = make_scheduler(max_batch_size=1)
    scheduler.add(request("a", 5, 9), 0.0)
    scheduler.add(request("b", 5, 9), 0.0)
    first, second = must_schedule(scheduler), must_schedule(scheduler)
    scheduler.update(first, result_of(first, EOS))
    scheduler.check_integrity()
    assert scheduler.stats()["num_pages_used"] == 2
    assert scheduler.schedule() is None  # the only slot is still held
    scheduler.update(second, result_of(second))
    assert scheduler.stats()["num_pages_used"] == 0
    assert shape(must_schedule(scheduler)) == [("b", 0, 5)]


# How a sample ends


@pytest.mark.parametrize(
    ("params", "tokens", "reason", "length"),
    [
        ({}, [TOKEN, EOS], FinishReason.EOS, 2),
        ({"ignore_eos": True}, [TOKEN, EOS, EOS], FinishReason.LENGTH, 5),
        ({"stop_token_ids": (9,)}, [TOKEN, 9], FinishReason.STOP, 2),
        ({"stop_token_ids": (EOS,), "ignore_eos": True}, [EOS], FinishReason.STOP, 1),
        ({"stop_token_ids": (EOS,)}, [EOS], FinishReason.EOS, 1),
        ({"min_tokens": 2}, [EOS, EOS, EOS], FinishReason.EOS, 3),
        ({}, [TOKEN] * 4 + [EOS], FinishReason.EOS, 5),
        ({}, [], FinishReason.LENGTH, 5),
    ],
)
def test_why_a_sample_ends(params: dict, tokens: list[int], reason: FinishReason, length: int):
    scheduler = make_scheduler()
    scheduler.add(request("a", 3, 5, **params), 0.0)
    outputs = []
    while scheduler.has_work:
        outputs += step(scheduler, lambda row: (tokens + [TOKEN] * 9)[row.num_output_tokens])[1]
    assert [token for output in outputs for token in output.token_ids] == (tokens + [TOKEN] * 9)[:length]
    assert [output.finish_reason for output in outputs] == [None] * (length - 1) + [reason]


def test_without_max_tokens_the_context_is_the_end():
    scheduler = make_scheduler(max_total_tokens=12)
    scheduler.add(request("a", 3, None), 0.0)
    _, outputs = run(scheduler)
    assert len(outputs) == 9 and outputs[-1].finish_reason is FinishReason.LENGTH


def test_several_tokens_a_step_end_at_a_stop_and_are_counted():
    config = SchedulerConfig(2, 16, PAGE_SIZE, 100, eos_token_ids=frozenset({EOS}), num_speculative_tokens=2)
    scheduler = Scheduler(config, [KVGroupPages(32)])
    scheduler.add(request("a", 3, 50), 0.0)
    told = []
    for tokens, count in (([5, 6, 0], 2), ([5, 0, 0], 1), ([5, EOS, 6], 3)):
        batch = must_schedule(scheduler)
        told += scheduler.update(batch, StepResult(np.array([tokens], np.int32), np.array([count], np.int32)))
        scheduler.check_integrity()
    assert [output.token_ids for output in told] == [[5, 6], [5], [5, EOS]]
    assert [output.finish_reason for output in told] == [None, None, FinishReason.EOS]
    assert not scheduler.has_work and scheduler.stats()["output_tokens"] == 5


# Prefix cache


def test_equal_beginnings_are_computed_once():
    scheduler = make_scheduler()
    scheduler.add(request("a", range(1, 14)), 0.0)
    run(scheduler)
    scheduler.add(request("b", [*range(1, 11), 50, 51, 52]), 0.0)
    batches, outputs = run(scheduler)
    assert shape(batches[0]) == [("b", 8, 5)]  # two full pages of four
    assert {output.num_cached_tokens for output in outputs} == {8}
    stats = scheduler.stats()
    assert (stats["prefix_queries"], stats["prefix_hits"], stats["prompt_tokens"]) == (26, 8, 26)


def test_the_last_prompt_token_is_always_computed():
    scheduler = make_scheduler()
    scheduler.add(request("a", range(1, 13), 2), 0.0)
    run(scheduler)
    scheduler.add(request("b", range(1, 13), 2), 0.0)
    assert shape(must_schedule(scheduler)) == [("b", 8, 4)]


def test_output_tokens_are_found_by_the_next_turn():
    scheduler = make_scheduler()
    scheduler.add(request("a", range(1, 7), 7), 0.0)
    run(scheduler)
    scheduler.add(request("b", [*range(1, 7), *[TOKEN] * 7, 50], 2), 0.0)
    assert shape(must_schedule(scheduler)) == [("b", 12, 2)]


@pytest.mark.parametrize(("salt", "adapter"), [("s", ""), ("", "x")])
def test_salts_and_adapters_do_not_share(salt: str, adapter: str):
    scheduler = make_scheduler()
    scheduler.add(request("a", range(1, 14)), 0.0)
    run(scheduler)
    scheduler.add(Request("b", tuple(range(1, 14)), SamplingParams(max_tokens=2), salt, adapter), 0.0)
    assert shape(step(scheduler)[0]) == [("b", 0, 13)]


def test_prefix_caching_can_be_off():
    scheduler = make_scheduler(prefix_caching=False)
    scheduler.add(request("a", range(1, 14)), 0.0)
    run(scheduler)
    scheduler.add(request("b", range(1, 14)), 0.0)
    assert shape(must_schedule(scheduler)) == [("b", 0, 13)]
    assert scheduler.stats()["prefix_queries"] == 0


def test_pages_of_a_step_that_is_not_collected_are_not_found():
    scheduler = make_scheduler()
    scheduler.add(request("a", range(1, 14)), 0.0)
    must_schedule(scheduler)
    scheduler.add(request("b", range(1, 14)), 0.0)
    assert shape(must_schedule(scheduler))[-1] == ("b", 0, 13)


def test_watchers_are_told_of_stored_and_removed_pages():
    class Watcher:
        def put_pages(self, changes: Sequence[PageChanges]) -> None:
            self.told = [(len(group.stored), len(group.removed)) for group in changes]

    scheduler, watcher = Scheduler(SchedulerConfig(2, 64, PAGE_SIZE, 20), [KVGroupPages(5)]), Watcher()
    scheduler.page_watchers.add(watcher)
    scheduler.page_watchers.tell()
    assert watcher.told == [(0, 0)]
    scheduler.add(request("a", 8, 2), 0.0)
    run(scheduler)
    scheduler.page_watchers.tell()
    assert watcher.told == [(2, 0)]
    scheduler.add(request("b", 18, 2), 0.0)
    run(scheduler)
    scheduler.page_watchers.tell()
    assert watcher.told == [(4, 2)]


# Several samples of one prompt


@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("lag", [True, False])
def test_samples_share_the_prompt_and_copy_only_its_partial_page(prefix_caching: bool, lag: bool):
    scheduler = make_scheduler(prefix_caching=prefix_caching)
    scheduler.add(request("a", 10, 3, n=3), 0.0)
    batches, outputs = run(scheduler, lag)
    assert shape(batches[0]) == [("a", 0, 10)]
    assert sorted(shape(batches[1])) == [("a", 9, 1), ("a", 9, 1), ("a", 10, 1)]
    assert [row.new_slot for row in batches[1].rows] == [False, True, True]
    copies = batches[1].page_copies
    assert len(copies) == 2 and len({source for _, source, _ in copies}) == 1 and len({target for _, _, target in copies}) == 2
    assert sum(batch.num_tokens for batch in batches) == 10 + 2 + 3 * 2  # the prompt once, its last token twice more
    assert sorted((output.index, len(output.token_ids)) for output in outputs) == [(i, 1) for i in range(3) for _ in range(3)]
    assert scheduler.stats()["prompt_tokens"] == 10


def test_samples_hold_the_full_pages_of_the_prompt_together():
    scheduler = make_scheduler()
    scheduler.add(request("a", 10, 9, n=4), 0.0)
    step(scheduler)
    step(scheduler)
    assert scheduler.stats()["num_pages_used"] == 2 + 4


def test_a_prompt_that_fills_its_last_page_is_copied_too_as_its_last_token_is_computed_again():
    scheduler = make_scheduler()
    scheduler.add(request("a", 8, 2, n=2), 0.0)
    step(scheduler)
    batch, _ = step(scheduler)
    ((_, source, target),) = batch.page_copies
    first, second = (row.sample for row in sorted(batch.rows, key=lambda row: row.sample.index))
    assert batch.rows[1].start == 7 and second.num_tokens == 9
    assert first is not second and source != target


def test_samples_that_found_no_slot_take_the_prompt_over_later():
    scheduler = make_scheduler(max_batch_size=2, prefix_caching=False)
    scheduler.add(request("a", 10, 3, n=5), 0.0)
    batches, outputs = run(scheduler)
    assert len([output for output in outputs if output.finish_reason]) == 5
    assert sum(batch.num_tokens for batch in batches) == 10 + 4 + 5 * 2


def test_a_prompt_counts_once_whatever_its_samples_find():
    # The window is past the prompt when the second sample comes, which therefore finds the prompt in the prefix cache.
    scheduler = make_scheduler(groups=[KVGroupPages(40), KVGroupPages(40, window=5)], max_batch_size=1)
    scheduler.add(request("a", 10, 9, n=2), 0.0)
    _, outputs = run(scheduler)
    stats = scheduler.stats()
    assert (stats["prompt_tokens"], stats["prefix_queries"], stats["prefix_hits"]) == (10, 10, 0)
    assert {output.num_cached_tokens for output in outputs} == {0}


def test_where_the_window_is_past_the_prompt_one_sample_computes_it_for_the_rest():
    scheduler = make_scheduler(groups=[KVGroupPages(60), KVGroupPages(60, window=5)], prefix_caching=False, max_batch_size=3)
    for name in "xy":
        scheduler.add(request(name, 3, 20), 0.0)
    scheduler.add(request("a", 10, 40, n=3), 0.0)
    batches, _ = run(scheduler)
    prompts = [row for batch in batches for row in batch.rows if row.sample.request.request_id == "a" and row.new_slot]
    assert [(row.sample.index, row.start) for row in prompts] == [(0, 0), (1, 0), (2, 9)]


def test_a_resumed_sample_gives_the_prompt_on():
    scheduler = make_scheduler(max_batch_size=1, prefix_caching=True)
    scheduler.add(request("a", 8, 20, n=2), 0.0)
    for _ in range(5):
        step(scheduler)
    scheduler._preempt(scheduler._running[0])
    scheduler._free_slots.append(1)  # room for both
    scheduler._config = SchedulerConfig(2, 64, PAGE_SIZE, 100)
    batch = must_schedule(scheduler)
    assert [(row.sample.index, row.start) for row in batch.rows] == [(0, 12)]
    scheduler.update(batch, result_of(batch))
    batch, _ = step(scheduler)
    assert [(row.sample.index, row.start) for row in batch.rows] == [(0, 13), (1, 7)]


def test_one_sample_can_be_aborted_alone():
    scheduler = make_scheduler()
    scheduler.add(request("a", 10, 3, n=3), 0.0)
    step(scheduler)
    scheduler.abort("a", 0)
    scheduler.abort("a", 5)
    scheduler.check_integrity()
    _, outputs = run(scheduler)
    assert {output.index for output in outputs} == {1, 2}


# Memory: order, preemption, windows


def test_a_smaller_request_passes_one_that_lacks_memory_but_not_for_ever():
    scheduler = make_scheduler(num_pages=24, prefix_caching=False, max_total_tokens=96)
    scheduler.add(request("long", 3, 93), 0.0)
    step(scheduler)
    scheduler.add(request("big", 90, 1), 0.0)
    admitted = []
    for i in range(93):
        scheduler.add(request(f"small{i}", 3, 1), 0.0)
        batch, _ = step(scheduler)
        admitted += [row.sample.request.request_id for row in batch.rows if row.new_slot]
    assert admitted[:MAX_PASSED] == [f"small{i}" for i in range(MAX_PASSED)]
    assert admitted[MAX_PASSED] == "big"


def test_a_passed_request_blocks_in_the_end():
    scheduler = make_scheduler(num_pages=12, prefix_caching=False, max_total_tokens=48)
    scheduler.add(request("a", 20, 28), 0.0)
    step(scheduler)
    scheduler.add(request("big", 40, 1), 0.0)
    (big,) = scheduler._waiting
    scheduler.add(request("small", 3, 1), 0.0)
    big.num_passed = MAX_PASSED
    assert [name for name, *_ in shape(step(scheduler)[0])] == ["a"]
    big.num_passed = MAX_PASSED - 1
    assert [name for name, *_ in shape(step(scheduler)[0])] == ["a", "small"]
    assert big.num_passed == MAX_PASSED
    big.num_passed = 0
    step(scheduler)  # nobody came
    assert big.num_passed == 0


@pytest.mark.parametrize(("num_pages", "admitted"), [(6, False), (7, True)])
def test_a_page_is_left_for_each_that_runs(num_pages: int, admitted: bool):
    scheduler = make_scheduler(num_pages=num_pages)
    scheduler.add(request("a", 3, 9), 0.0)
    step(scheduler)
    scheduler.add(request("b", 20, 2), 0.0)
    assert ("b" in [name for name, *_ in shape(step(scheduler)[0])]) == admitted


def test_the_latest_arrival_is_preempted_and_keeps_its_tokens():
    scheduler = make_scheduler(num_pages=6, max_total_tokens=24, prefix_caching=False)
    scheduler.add(request("a", 7, 13), 0.0)
    scheduler.add(request("b", 7, 9), 0.0)
    batches, outputs = run(scheduler, lag=True)
    assert scheduler.stats()["num_preemptions"] >= 1
    lengths = {name: sum(len(o.token_ids) for o in outputs if o.request_id == name) for name in "ab"}
    assert lengths == {"a": 13, "b": 9}
    resumed = [row for batch in batches[1:] for row in batch.rows if row.new_slot]
    assert resumed and {row.sample.request.request_id for row in resumed} == {"b"}
    assert resumed[0].start == 0 and resumed[0].num_output_tokens > 0
    assert list(resumed[0].token_ids)[7:] == [TOKEN] * (resumed[0].num_tokens - 7)
    # The earliest runs in every step but those that wait for the pages of the preempted one.
    steps_of_a = [i for i, batch in enumerate(batches) if any(row.sample.request.request_id == "a" for row in batch.rows)]
    assert steps_of_a[-1] <= 13 + scheduler.stats()["num_preemptions"]


def test_resuming_is_no_prefix_hit_and_no_arrival():
    now = iter(range(1000))
    scheduler = make_scheduler(num_pages=6, max_total_tokens=24, clock=lambda: float(next(now)))
    scheduler.add(request("a", 7, 13), 0.0)
    scheduler.add(request("b", 7, 9), 0.0)
    _, outputs = run(scheduler)
    stats = scheduler.stats()
    assert stats["num_preemptions"] >= 1
    assert (stats["prefix_queries"], stats["prefix_hits"], stats["prompt_tokens"]) == (14, 0, 14)
    assert {output.num_cached_tokens for output in outputs} == {0}
    assert {(output.request_id, output.queue_time) for output in outputs} == {("a", 0.0), ("b", 1.0)}


def test_one_is_preempted_where_one_is_enough():
    scheduler = make_scheduler(num_pages=9, prefix_caching=False)
    for name in "abc":  # all need their fourth page in the same step; those of one come when the step in flight is collected
        scheduler.add(request(name, 8, 8), 0.0)
    batches, _ = run(scheduler, lag=True)
    assert scheduler.stats()["num_preemptions"] == 1
    resumed = [row.sample.request.request_id for batch in batches[1:] for row in batch.rows if row.new_slot]
    assert resumed == ["c"]


def test_a_preempted_sample_waits_for_its_token_in_flight():
    scheduler = make_scheduler(max_total_tokens=40)
    scheduler.add(request("a", 5, 9), 0.0)
    first, second = must_schedule(scheduler), must_schedule(scheduler)
    scheduler._preempt(first.rows[0].sample)
    scheduler.check_integrity()
    assert scheduler.schedule() is None
    assert scheduler.update(first, result_of(first, 8))[0].token_ids == [8]
    assert scheduler.schedule() is None
    assert scheduler.update(second, result_of(second, 9))[0].token_ids == [9]
    (row,) = must_schedule(scheduler).rows
    assert row.new_slot and row.start == 4 and list(row.token_ids)[1:] == [8, 9] and row.num_output_tokens == 2


def test_two_that_cannot_run_together_both_end():
    scheduler = make_scheduler(num_pages=6, max_total_tokens=25)
    for request_id in "abcd":
        scheduler.add(request(request_id, 5, 20), 0.0)
    _, outputs = run(scheduler, lag=True)
    assert len(outputs) == 80


def test_what_can_never_fit_is_refused():
    scheduler = make_scheduler(num_pages=4, max_total_tokens=40)
    scheduler.add(request("fits", 10, 7), 0.0)  # 17 tokens, of which the last is never computed
    with pytest.raises(ContextTooLong):
        scheduler.add(request("too long", 10, 8), 0.0)
    with pytest.raises(ContextTooLong):
        scheduler.add(request("a", 30, 11), 0.0)
    with pytest.raises(ContextTooLong):
        make_scheduler(max_total_tokens=10).add(request("a", 10, None), 0.0)
    with pytest.raises(InvalidRequest, match="fits is in use"):
        scheduler.add(request("fits", 3), 0.0)
    scheduler.check_integrity()
    assert len(run(scheduler)[1]) == 7


def test_pages_behind_a_window_are_freed():
    scheduler = make_scheduler(groups=[KVGroupPages(40), KVGroupPages(5, window=6)], max_batch_tokens=8)
    scheduler.add(request("a", 30, 20), 0.0)
    most_held = 0
    for _ in range(4 + 18):
        batch, _ = step(scheduler)
        (row,) = batch.rows
        full, windowed = row.sample.page_tables
        first_seen = max(0, row.start + row.num_tokens - 5) // PAGE_SIZE  # by the next token
        kept, freed = row.sample.num_freed_pages
        assert len(full) == len(windowed) and kept == 0
        assert freed <= first_seen <= freed + 1  # looked at whenever a page is full
        assert list(windowed[:freed]) == [0] * freed
        most_held = max(most_held, scheduler._tables.pools[1].num_held)
    assert most_held <= 4


def test_a_long_prompt_needs_no_more_of_a_windowed_group_than_it_holds_at_once():
    scheduler = make_scheduler(groups=[KVGroupPages(60), KVGroupPages(10, window=6)], max_batch_tokens=8)
    scheduler.add(request("a", 4, 30), 0.0)
    step(scheduler)
    scheduler.add(request("b", 80, 2), 0.0)  # 20 pages
    assert shape(step(scheduler)[0]) == [("a", 4, 1), ("b", 0, 7)]
    assert len(run(scheduler)[1]) == 28 + 2


def test_a_windowed_prefix_hit_needs_only_the_last_window():
    groups = [KVGroupPages(40), KVGroupPages(7, window=6)]
    scheduler = make_scheduler(groups=groups, max_batch_tokens=8)
    scheduler.add(request("a", range(1, 33), 2), 0.0)
    run(scheduler)
    scheduler.add(request("b", [*range(1, 33), 50], 2), 0.0)
    batch, _ = step(scheduler)
    assert shape(batch) == [("b", 32, 1)]
    sample = batch.rows[0].sample
    assert sample.num_freed_pages == [0, 6] and list(sample.page_tables[1][:6]) == [0] * 6


# Waiting for something else than memory


def test_a_request_that_is_not_ready_blocks_nobody():
    scheduler = make_scheduler()
    scheduler.add(request("grammar", 5), 0.0, constrained=True, ready=False)
    assert not scheduler.has_work and scheduler.schedule() is None
    scheduler.add(request("a", 5, 2), 0.0)
    batch, _ = step(scheduler)
    assert shape(batch) == [("a", 0, 5)] and not batch.constrained
    scheduler.set_ready("grammar")
    scheduler.set_ready("unknown")
    batch, _ = step(scheduler)
    assert shape(batch) == [("a", 5, 1), ("grammar", 0, 5)] and batch.constrained


# Aborts and failures


def test_an_aborted_request_yields_nothing_more_and_its_id_can_be_used_again():
    scheduler = make_scheduler()
    scheduler.add(request("a", 5, 9), 0.0)
    first = must_schedule(scheduler)
    second = must_schedule(scheduler)
    scheduler.abort("a")
    scheduler.abort("unknown")
    scheduler.check_integrity()
    scheduler.add(request("a", 6, 2), 0.0)
    assert scheduler.update(first, result_of(first)) == []
    assert scheduler.stats()["num_pages_used"] == 2  # the second step still holds them
    assert scheduler.update(second, result_of(second)) == []
    assert scheduler.stats()["num_pages_used"] == 0
    assert len(run(scheduler)[1]) == 2


def test_a_waiting_request_can_be_aborted():
    scheduler = make_scheduler(max_batch_size=1)
    scheduler.add(request("a", 5, 9), 0.0)
    scheduler.add(request("b", 5, 9, n=2), 0.0)
    step(scheduler)
    scheduler.abort("b")
    scheduler.check_integrity()
    assert scheduler.stats()["num_waiting"] == 0


def test_a_failed_step_ends_its_requests_and_only_those():
    scheduler = make_scheduler(max_batch_tokens=16)
    scheduler.add(request("a", 5, 9, n=2), 0.0)
    first = must_schedule(scheduler)
    scheduler.add(request("b", 5, 2), 0.0)
    second = must_schedule(scheduler)
    outputs = scheduler.fail(first, "out of memory")
    assert [(o.request_id, o.index, o.finish_reason, o.error) for o in outputs] == [
        ("a", i, FinishReason.ERROR, "out of memory") for i in range(2)
    ]
    scheduler.check_integrity()
    (output,) = scheduler.update(second, result_of(second))
    assert output.request_id == "b"
    run(scheduler)
    assert scheduler.stats()["num_pages_used"] == 0


def test_what_a_failed_step_wrote_is_never_found():
    scheduler = make_scheduler(max_batch_tokens=8)
    scheduler.add(request("a", range(1, 25), 2), 0.0)
    first, second = must_schedule(scheduler), must_schedule(scheduler)
    scheduler.update(first, result_of(first))
    scheduler.fail(second, "broken")
    scheduler.add(request("b", range(1, 25), 2), 0.0)
    assert shape(must_schedule(scheduler)) == [("b", 8, 8)]


def test_a_failed_step_spares_a_new_request_of_an_old_id():
    scheduler = make_scheduler()
    scheduler.add(request("a", 5, 9), 0.0)
    batch = must_schedule(scheduler)
    scheduler.abort("a")
    scheduler.add(request("a", 6, 2), 0.0)
    assert scheduler.fail(batch, "broken") == []
    assert len(run(scheduler)[1]) == 2


# Outputs and counters


def test_logprobs_go_to_those_who_asked_as_many_as_they_asked_for():
    scheduler = make_scheduler()
    for name, wanted in (("none", None), ("chosen", 0), ("two", 2)):
        scheduler.add(request(name, 5, 2, logprobs=wanted), 0.0)
    batch = must_schedule(scheduler)
    result = result_of(batch)
    top = np.arange(3 * 5, dtype=np.float32).reshape(3, 1, 5)
    raw = np.array([[-1.0], [-2.0], [-3.0]], np.float32)
    result.logprobs = StepLogprobs(raw, raw * 2, top.astype(np.int32), -top, -2 * top)
    none, chosen, two = scheduler.update(batch, result)
    assert none.logprobs == []
    (entry,) = chosen.logprobs
    assert (entry.raw, entry.processed, entry.top_token_ids) == (-2.0, -4.0, [])
    (entry,) = two.logprobs
    assert (entry.top_token_ids, entry.top_raw, entry.top_processed) == ([10, 11], [-10.0, -11.0], [-20.0, -22.0])


def test_queue_time_is_from_arrival_to_the_first_step():
    now = [10.0]
    scheduler = make_scheduler(max_batch_size=1, clock=lambda: now[0])
    scheduler.add(request("a", 5, 2), 9.5)
    scheduler.add(request("b", 5, 2), 9.5)
    _, (first,) = step(scheduler)
    now[0] = 12.0
    outputs = run(scheduler)[1]
    assert first.queue_time == 0.5
    assert [(o.request_id, o.queue_time) for o in outputs] == [("a", 0.5), ("b", 2.5), ("b", 2.5)]


def test_stats_tell_what_runs_waits_and_is_held():
    scheduler = make_scheduler(num_pages=16, max_batch_size=1)
    scheduler.add(request("a", 5, 2), 0.0)
    scheduler.add(request("b", 5, 2), 0.0)
    step(scheduler)
    stats = scheduler.stats()
    assert (stats["num_running"], stats["num_waiting"]) == (1, 1)
    assert (stats["num_pages_used"], stats["num_pages"], stats["output_tokens"]) == (2, 16, 1)
    batch = must_schedule(scheduler)
    assert scheduler.stats()["num_running"] == 1  # its last token is in flight
    scheduler.update(batch, result_of(batch))
    assert scheduler.stats()["num_running"] == 0


def test_check_integrity_names_what_is_lost():
    def running() -> Scheduler:
        scheduler = make_scheduler()
        scheduler.add(request("a", 10, 9), 0.0)
        step(scheduler)
        return scheduler

    scheduler = running()
    scheduler._free_slots.pop()
    with pytest.raises(AssertionError, match="slots"):
        scheduler.check_integrity()
    scheduler = running()
    scheduler._running[0].page_tables[0].pop()
    with pytest.raises(AssertionError, match="references"):
        scheduler.check_integrity()
    scheduler = running()
    scheduler._running.clear()
    with pytest.raises(AssertionError, match="not where its state says"):
        scheduler.check_integrity()
    scheduler = running()
    scheduler._requests.clear()
    with pytest.raises(AssertionError, match="listed"):
        scheduler.check_integrity()


def test_a_step_fills_a_compiled_size_where_decodes_run_anyway():
    config = SchedulerConfig(4, 64, PAGE_SIZE, 100, step_sizes=(16, 32, 64))
    scheduler = Scheduler(config, [KVGroupPages(64)], lambda: 0.0)
    scheduler.add(request("a", 40, 8), 0.0)
    assert shape(must_schedule(scheduler)) == [("a", 0, 40)], "alone, a little padding is cheaper than another step"
    scheduler.add(request("b", 39, 8), 0.0)
    assert [row.num_tokens for row in must_schedule(scheduler).rows] == [1, 31]
    assert [row.num_tokens for row in must_schedule(scheduler).rows] == [1, 8], "half of a small rest would be no progress"


def test_a_scored_prompt_waits_where_a_step_was_not_made_for_it(monkeypatch: pytest.MonkeyPatch):
    config = SchedulerConfig(4, 64, PAGE_SIZE, 100, max_scored_tokens=16)
    scheduler = Scheduler(config, [KVGroupPages(64)], lambda: 0.0)
    scheduler.add(request("a", 40, 8, prompt_logprobs=1), 0.0)
    scheduler.add(request("b", 40, 8), 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(scheduler, "_may_score", lambda behind: False)
        assert shape(must_schedule(scheduler)) == [("b", 0, 40)]
    batch = must_schedule(scheduler)
    assert shape(batch) == [("b", 40, 1), ("a", 0, 15)] and batch.num_scored == 15


@pytest.mark.parametrize("longest", [40, 700, 3000])
def test_padding_is_small_on_any_mix(longest: int):
    rng = np.random.default_rng(longest)
    buckets = Buckets.for_platform("gpu", 256, 8192, 0)
    config = SchedulerConfig(256, 8192, 16, 4096, prefix_caching=False, step_sizes=buckets.step_sizes)
    scheduler = Scheduler(config, [KVGroupPages(60_000)], lambda: 0.0)
    useful = padded = 0
    for number in range(300):
        while scheduler.stats()["num_running"] + scheduler.stats()["num_waiting"] < 64 + number % 100:
            length, out = int(rng.integers(1, longest)), int(rng.integers(1, 120))
            scheduler.add(Request(f"{number}-{rng.random()}", (1,) * length, SamplingParams(max_tokens=out)), 0.0)
        batch = must_schedule(scheduler)
        scheduler.update(batch, result_of(batch))
        bucket = buckets.pick(batch.num_tokens, len(batch.rows))
        useful, padded = useful + batch.num_tokens, padded + bucket.num_tokens - batch.num_tokens
    assert padded < 0.1 * (useful + padded)
