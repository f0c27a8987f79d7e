"""The scheduler against a simulated device: whatever it is asked to compute, each token must find its own past in the pages.

The device keeps, at every offset of every page, a fingerprint of the whole history that was written there, as K/V is a function of the
whole history. It computes steps in the order they are dispatched, checks all that a row would read, and samples the next token as a
function of the history. So a wrong page table, a page reused or freed too early, a missing copy, a false prefix hit or a token out of
place fails at the step where it happens; and every sample must get the tokens that its request gets alone.
"""

import random
from collections import deque
from dataclasses import dataclass, field
from itertools import count

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from jaxserve.request import FinishReason, Request, SamplingParams
from jaxserve.scheduler import KVGroupPages, Sample, ScheduledBatch, ScheduledRow, Scheduler, SchedulerConfig
from jaxserve.step import StepResult

VOCAB_SIZE = 24
EOS = frozenset({0})


def extend(fingerprint: int, token: int) -> int:
    return hash((fingerprint, token))


def root(request: Request) -> int:
    return sum(map(ord, request.adapter))  # an adapter changes K/V, a salt does not


def next_token(request: Request, index: int, fingerprint: int, num_output_tokens: int) -> int:
    """The simulated model and sampler; index stands for the sample's own noise."""
    banned = EOS | set(request.params.stop_token_ids) if num_output_tokens < request.params.min_tokens else set()
    attempts = (hash((fingerprint, index, attempt)) % VOCAB_SIZE for attempt in count())
    return next(token for token in attempts if token not in banned)


def solo(request: Request, index: int, max_total_tokens: int) -> tuple[list[int], FinishReason]:
    """What one sample yields with no scheduler at all."""
    params, fingerprint, output = request.params, root(request), []
    for token in request.prompt_token_ids:
        fingerprint = extend(fingerprint, token)
    limit = params.max_tokens or max_total_tokens - len(request.prompt_token_ids)
    while True:
        token = next_token(request, index, fingerprint, len(output))
        output.append(token)
        fingerprint = extend(fingerprint, token)
        if len(output) > params.min_tokens:
            if token in EOS and not params.ignore_eos:
                return output, FinishReason.EOS
            if token in params.stop_token_ids:
                return output, FinishReason.STOP
        if len(output) == limit:
            return output, FinishReason.LENGTH


@dataclass
class DeviceStep:
    """A dispatched step: its result, and what it holds."""

    batch: ScheduledBatch
    result: StepResult | None  # None: the step fails, and writes nothing
    slots: dict[int, Sample] = field(default_factory=dict)
    # (group, page) -> samples
    read: dict[tuple[int, int], set[Sample]] = field(default_factory=dict)
    written: dict[tuple[int, int], set[Sample]] = field(default_factory=dict)


class Device:
    """Page memory and the last tokens by slot."""

    def __init__(self, config: SchedulerConfig, groups: list[KVGroupPages], draws: random.Random):
        self.page_size = config.page_size
        self.num_speculative_tokens = config.num_speculative_tokens
        self.groups = groups
        self.memory = [[[0] * config.page_size for _ in range(group.num_pages)] for group in groups]
        self.last_tokens = [-1] * config.max_batch_size
        self.histories: dict[Sample, list[int]] = {}
        self.fingerprints: dict[Sample, list[int]] = {}
        self.in_flight: deque[DeviceStep] = deque()
        self.num_copies = 0
        self.draws = draws

    def dispatch(self, batch: ScheduledBatch, fails: bool = False) -> None:
        step = DeviceStep(batch, None if fails else self._empty_result(batch))
        if step.result is not None:
            lost = {row.sample for earlier in self.in_flight if earlier.result is None for row in earlier.batch.rows}
            failing = {sample.request.request_id for sample in lost}
            self._copy(batch)
            rows = [(i, row) for i, row in enumerate(batch.rows) if row.sample not in lost]
            spans = [self._write(row, step) for _, row in rows]
            for (_, row), span in zip(rows, spans, strict=True):
                if row.sample.request.request_id not in failing:  # what is forked from a lost sample reads nonsense, and will fail too
                    self._read(row, span, step)
            for i, row in rows:
                if row.samples:
                    self._sample(row, step.result, i)
            self._check_overlap(step)
        self.in_flight.append(step)

    def collect(self) -> DeviceStep:
        return self.in_flight.popleft()

    def _empty_result(self, batch: ScheduledBatch) -> StepResult:
        padded = len(batch.rows) + 2
        return StepResult(np.full((padded, 1 + self.num_speculative_tokens), -7, np.int32), np.zeros(padded, np.int32))

    def _copy(self, batch: ScheduledBatch) -> None:
        # All sources are read before any target is written, as one gather and one scatter do.
        self.num_copies += len(batch.page_copies)
        sources = [list(self.memory[group][source]) for group, source, _ in batch.page_copies]
        for (group, _, target), content in zip(batch.page_copies, sources, strict=True):
            self.memory[group][target][:] = content

    def _write(self, row: ScheduledRow, step: DeviceStep) -> range:
        sample = row.sample
        history = self.histories.setdefault(sample, list(sample.request.prompt_token_ids))
        prints = self.fingerprints.setdefault(sample, [])
        while len(prints) < len(history):
            prints.append(extend(prints[-1] if prints else root(sample.request), history[len(prints)]))
        assert step.slots.setdefault(sample.slot, sample) is sample, "two rows share a slot"
        assert sample.slot >= 0 and len(row.token_ids) == row.num_tokens > 0
        start = row.start
        tokens = [self.last_tokens[sample.slot] if token < 0 else token for token in row.token_ids]
        if self.num_speculative_tokens and row.num_tokens == 1 and not row.new_slot and row.samples:
            # The device alone knows how many tokens the step in flight has yielded.
            start = len(history) - 1
            tokens = [history[-1]]
            assert row.start <= start
        assert tokens == history[start : start + row.num_tokens], "the tokens are not the history's"
        assert row.samples == (start + row.num_tokens == len(history))
        span = range(start, start + row.num_tokens)
        drafted = range(span.stop, span.stop + self.num_speculative_tokens) if row.samples else ()
        for group, table in enumerate(sample.page_tables):
            for position in [*span, *drafted]:
                page, offset = divmod(position, self.page_size)
                if page < len(table):
                    self.memory[group][table[page]][offset] = prints[position] if position < span.stop else ~position
                    step.written.setdefault((group, table[page]), set()).add(sample)
                else:
                    assert position >= sample.max_num_tokens - 1, "a token has no page to go to"
        return span

    def _read(self, row: ScheduledRow, span: range, step: DeviceStep) -> None:
        sample = row.sample
        for group, table in enumerate(sample.page_tables):
            window = self.groups[group].window
            first = 0 if window is None else max(0, span.start - window + 1)
            for position in range(first, span.stop):
                page, offset = divmod(position, self.page_size)
                if page < len(table):  # else it lies past the end, and what it yields is dropped
                    assert self.memory[group][table[page]][offset] == self.fingerprints[sample][position], (group, position)
                    step.read.setdefault((group, table[page]), set()).add(sample)

    def _sample(self, row: ScheduledRow, result: StepResult, i: int) -> None:
        """Append what the model yields; with speculation also a lucky number of further tokens, whose K/V counts as written."""
        sample = row.sample
        history, prints = self.histories[sample], self.fingerprints[sample]
        num_yielded = 1 + self.draws.randint(0, self.num_speculative_tokens)
        for k in range(num_yielded):
            if k > 0:
                self._accept_draft(sample, len(history) - 1)
            token = next_token(sample.request, sample.index, prints[-1], len(history) - sample.num_prompt_tokens)
            history.append(token)
            prints.append(extend(prints[-1], token))
            result.token_ids[i, k] = token
        result.counts[i] = num_yielded
        self.last_tokens[sample.slot] = history[-1]

    def _accept_draft(self, sample: Sample, position: int) -> None:
        page, offset = divmod(position, self.page_size)
        for group, table in enumerate(sample.page_tables):
            if page < len(table):
                self.memory[group][table[page]][offset] = self.fingerprints[sample][position]

    def _check_overlap(self, step: DeviceStep) -> None:
        """Only its own sample writes to a page; and what a step in flight holds is not given to others."""
        for page, writers in step.written.items():
            assert step.read.get(page, writers) == writers and len(writers) == 1, "a shared page is written to"
        for group, _, target in step.batch.page_copies:
            step.written.setdefault((group, target), set())
        for earlier in self.in_flight:
            for slot, sample in step.slots.items():
                assert earlier.slots.get(slot, sample) is sample, f"slot {slot} was given away while a step in flight holds it"
            for page, writers in step.written.items():
                for holders in earlier.read.get(page), earlier.written.get(page):
                    assert holders is None or holders == writers, f"page {page} was given away while a step in flight holds it"


@dataclass
class Arrival:
    """A request, the step at which it comes, and the step at which its client goes away."""

    request: Request
    step: int
    abort_step: int | None = None


@dataclass
class Case:
    """A load, and the scheduler that it meets."""

    config: SchedulerConfig
    groups: list[KVGroupPages]
    arrivals: list[Arrival]
    lag: bool
    seed: int = 0
    failing_steps: frozenset[int] = frozenset()


class Driver:
    """Runs a case to its end, checking everything after every step."""

    def __init__(self, case: Case):
        self.case = case
        self.scheduler = Scheduler(case.config, case.groups, clock=lambda: float(self.step_number))
        self.device = Device(case.config, case.groups, random.Random(case.seed))
        self.step_number = 0
        self.tokens: dict[tuple[str, int], list[int]] = {}
        self.reasons: dict[tuple[str, int], FinishReason] = {}
        self.aborted: set[str] = set()

    def run(self) -> "Driver":
        last_event = max([a.step for a in self.case.arrivals] + [a.abort_step or 0 for a in self.case.arrivals])
        while self.scheduler.has_work or self.step_number <= last_event:
            self.step()
            assert self.step_number < 3_000, "no progress"
        stats = self.scheduler.stats()
        assert stats["num_pages_used"] == 0 and stats["num_running"] == 0 and stats["num_waiting"] == 0
        self.check_tokens()
        return self

    def step(self) -> None:
        for arrival in self.case.arrivals:
            if arrival.step == self.step_number:
                self.scheduler.add(arrival.request, float(self.step_number))
            if arrival.abort_step == self.step_number:
                self.scheduler.abort(arrival.request.request_id)
                self.aborted.add(arrival.request.request_id)
        batch = self.scheduler.schedule()
        self.scheduler.check_integrity()
        if batch is not None:
            self.check_batch(batch)
            self.device.dispatch(batch, self.step_number in self.case.failing_steps)
        wanted = 1 if self.case.lag and batch is not None else 0
        while len(self.device.in_flight) > wanted:
            self.update()
        self.step_number += 1

    def update(self) -> None:
        step = self.device.collect()
        outputs = self.scheduler.fail(step.batch, "lost") if step.result is None else self.scheduler.update(step.batch, step.result)
        for output in outputs:
            key = output.request_id, output.index
            assert output.request_id not in self.aborted and key not in self.reasons, "an output after the end"
            assert bool(output.token_ids) == (output.finish_reason is not FinishReason.ERROR)
            self.tokens.setdefault(key, []).extend(output.token_ids)
            if output.finish_reason is not None:
                self.reasons[key] = output.finish_reason
        self.scheduler.check_integrity()

    def check_batch(self, batch: ScheduledBatch) -> None:
        assert batch.num_tokens == sum(row.num_tokens for row in batch.rows) <= self.case.config.max_batch_tokens
        lengths = [row.num_tokens > 1 for row in batch.rows]
        assert lengths == sorted(lengths), "rows of one token come first"
        assert len({row.sample for row in batch.rows}) == len(batch.rows) <= self.case.config.max_batch_size

    def check_tokens(self) -> None:
        for arrival in self.case.arrivals:
            request = arrival.request
            for index in range(request.params.n):
                key = request.request_id, index
                tokens, reason = solo(request, index, self.case.config.max_total_tokens)
                yielded = self.tokens.get(key, [])
                if request.request_id in self.aborted or (self.case.failing_steps and self.reasons[key] is FinishReason.ERROR):
                    assert yielded == tokens[: len(yielded)]
                else:
                    assert (yielded, self.reasons[key]) == (tokens, reason)


MAX_TOTAL_TOKENS = 56


def least_pages(page_size: int, window: int | None, num_speculative_tokens: int) -> int:
    """Pages of a group with which the longest request can run alone: of all its tokens but the last, or of a window wherever it begins."""
    whole = -(-(MAX_TOTAL_TOKENS - 1) // page_size)
    return whole if window is None else min(whole, -(-(window - 1 + 2 * num_speculative_tokens) // page_size) + 1)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    page_size = draw(st.sampled_from([1, 2, 4, 8]))
    speculative = draw(st.sampled_from([0, 0, 0, 1, 3]))
    max_batch_size = draw(st.integers(1, 6))
    groups = []
    for window in draw(st.sampled_from([[None], [None, 5], [9], [None, 6, 13], [1], [7, None]])):
        smallest = least_pages(page_size, window, speculative)
        groups.append(KVGroupPages(smallest + draw(st.sampled_from([0, 1, 3, 2 * smallest])), window))
    config = SchedulerConfig(
        max_batch_size=max_batch_size,
        max_batch_tokens=max_batch_size + draw(st.sampled_from([0, 3, 17, 100])),
        page_size=page_size,
        max_total_tokens=MAX_TOTAL_TOKENS,
        prefix_caching=draw(st.booleans()),
        eos_token_ids=EOS,
        max_prefill_tokens_while_decoding=draw(st.sampled_from([None, None, 1, 5])),
        num_speculative_tokens=speculative,
    )
    beginnings = [tuple(random.Random(i).choices(range(VOCAB_SIZE), k=40)) for i in range(2)]
    arrivals = []
    for i in range(draw(st.integers(1, 8))):
        shared = draw(st.integers(0, 40))
        own = draw(st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=0 if shared else 1, max_size=6))
        prompt = beginnings[draw(st.integers(0, 1))][:shared] + tuple(own)
        max_tokens = draw(st.one_of(st.none(), st.integers(1, MAX_TOTAL_TOKENS - len(prompt))))
        params = SamplingParams(
            n=draw(st.sampled_from([1, 1, 1, 2, 4])),
            max_tokens=max_tokens,
            min_tokens=draw(st.integers(0, min(5, max_tokens or 5))),
            ignore_eos=draw(st.booleans()),
            stop_token_ids=draw(st.sampled_from([(), (), (3, 5), (0, 7)])),
        )
        request = Request(f"r{i}", prompt, params, draw(st.sampled_from(["", "", "salt"])), draw(st.sampled_from(["", "", "adapter"])))
        step = draw(st.integers(0, 12))
        abort_step = step + draw(st.integers(0, 25)) if draw(st.integers(0, 3)) == 0 else None
        arrivals.append(Arrival(request, step, abort_step))
    failing = frozenset(draw(st.lists(st.integers(0, 30), max_size=2))) if draw(st.integers(0, 3)) == 0 else frozenset[int]()
    return Case(config, groups, arrivals, lag=draw(st.booleans()), seed=draw(st.integers(0, 99)), failing_steps=failing)


@settings(max_examples=120, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
@given(cases())
def test_every_token_finds_its_past_and_every_sample_its_tokens(case: Case):
    Driver(case).run()


@pytest.mark.parametrize("lag", [True, False])
@pytest.mark.parametrize("window", [None, 12])
def test_a_heavy_load_on_a_tiny_cache(lag: bool, window: int | None):
    """40 requests on memory for three: what the random cases do seldom is here done by all."""
    draws = random.Random(1)
    beginnings = [tuple(draws.choices(range(1, VOCAB_SIZE), k=24)) for _ in range(3)]
    arrivals = []
    for i in range(40):
        prompt = draws.choice(beginnings)[: draws.randint(1, 24)] + tuple(draws.choices(range(VOCAB_SIZE), k=draws.randint(0, 8)))
        params = SamplingParams(n=draws.choice([1, 1, 1, 3]), max_tokens=draws.randint(1, 24), ignore_eos=draws.random() < 0.9)
        step = draws.randint(0, 60)
        arrivals.append(Arrival(Request(f"r{i}", prompt, params), step, step + draws.randint(0, 30) if i % 6 == 0 else None))
    config = SchedulerConfig(8, 20, 2, MAX_TOTAL_TOKENS, eos_token_ids=EOS)
    groups = [KVGroupPages(32)] + ([KVGroupPages(24, window)] if window else [])
    driver = Driver(Case(config, groups, arrivals, lag)).run()
    stats = driver.scheduler.stats()
    assert stats["num_preemptions"] >= 5 and stats["prefix_hits"] >= 50 and driver.device.num_copies >= 5
    assert len(driver.aborted) == 7


@pytest.mark.parametrize("lag", [True, False])
@pytest.mark.parametrize("page_size", [1, 4, 8])
@pytest.mark.parametrize("num_speculative_tokens", [0, 1, 3])
@pytest.mark.parametrize("windows", [[None], [5], [None, 9], [2, 13]])
def test_one_request_runs_in_the_least_memory(lag: bool, page_size: int, num_speculative_tokens: int, windows: list[int | None]):
    groups = [KVGroupPages(least_pages(page_size, window, num_speculative_tokens), window) for window in windows]
    config = SchedulerConfig(1, 16, page_size, MAX_TOTAL_TOKENS, num_speculative_tokens=num_speculative_tokens)
    request = Request("r", tuple(range(20)), SamplingParams(max_tokens=None, ignore_eos=True))
    driver = Driver(Case(config, groups, [Arrival(request, 0)], lag)).run()
    assert len(driver.tokens["r", 0]) == MAX_TOTAL_TOKENS - 20 and driver.scheduler.stats()["num_preemptions"] == 0
