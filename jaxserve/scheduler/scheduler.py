"""Scheduler: which samples run, and which of their tokens the next step computes."""

import time
from bisect import insort
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from operator import attrgetter

from jaxserve.errors import ContextTooLong, InvalidRequest
from jaxserve.request import Request, TokenOutput
from jaxserve.scheduler.batch import IN_FLIGHT, ScheduledBatch, ScheduledRow
from jaxserve.scheduler.config import KVGroupPages, SchedulerConfig
from jaxserve.scheduler.outputs import error_output, receive
from jaxserve.scheduler.page_tables import PageTables
from jaxserve.scheduler.page_watchers import PageWatchers
from jaxserve.scheduler.prefill_budget import MAX_LOOKED_AT, PrefillBudget, tokens_for_prompts
from jaxserve.scheduler.sample import NEVER, Sample, SampleState
from jaxserve.step import StepResult

MAX_PASSED = 64  # steps in which later samples may pass one that lacks memory; then it blocks them
MAX_SKIPPED = 8  # samples skipped for lack of memory before the search for a smaller one ends

WAITING, RUNNING, FINISHED = SampleState.WAITING, SampleState.RUNNING, SampleState.FINISHED
ARRIVAL = attrgetter("order")


class Scheduler:
    """First come, first served, under a token budget a step and the pages there are. (While a long prompt is scored see PrefillBudget.)

    There is no prefill phase and no decode phase: a sample's num_computed_tokens catches up with its num_tokens, by one token a step
    once it has caught up, by chunks before. Running samples come before waiting ones. A waiting sample is passed by later ones only
    where it lacks memory and they do not, and not for ever (MAX_PASSED). A running sample that lacks a page takes those of the sample
    that arrived last, which will compute its tokens again; it never takes them from an earlier one, so that the earliest always moves.

    One step of lag: schedule() may be called for step n+1 before update() for step n, at most two batches being in flight; every batch
    goes to update() or fail() once, in order. Called in turns it schedules the same tokens. What leaves (finished, aborted, preempted)
    gives its slot and pages back once no step in flight holds them. Not thread-safe.

    Args:
        config: limits.
        groups: the KV groups, at least one.
        clock: seconds; the one of `add`'s `now`.

    Attributes:
        page_watchers: who is told which pages are stored and removed.
    """

    def __init__(self, config: SchedulerConfig, groups: Sequence[KVGroupPages], clock: Callable[[], float] = time.monotonic):
        self._config = config
        self._clock = clock
        # Memory
        self._tables = PageTables(config, groups)
        self.page_watchers = PageWatchers(self._tables.pools)
        self._free_slots = list(range(config.max_batch_size - 1, -1, -1))
        # Samples: unfinished ones by request; those to admit and those that run in order of arrival; those still held by a step
        self._requests: dict[str, list[Sample]] = {}
        self._waiting: deque[Sample] = deque()
        self._running: list[Sample] = []
        self._leaving: set[Sample] = set()
        self._num_arrived = 0
        self._num_constrained = 0  # unfinished samples; none costs nothing
        self._num_scoring = 0  # likewise
        self._step = 0
        # Counters of EngineStats
        self._prefix_queries = 0
        self._prefix_hits = 0
        self._num_preemptions = 0
        self._prompt_tokens = 0
        self._output_tokens = 0

    def add(self, request: Request, now: float, *, constrained: bool = False, ready: bool = True) -> None:
        """Queue the n samples of a request.

        Args:
            request: validated (Request.validate).
            now: seconds, by the scheduler's clock.
            constrained: its tokens must obey a grammar.
            ready: may be scheduled at once; otherwise after set_ready().

        Raises:
            ContextTooLong: it can never fit.
            InvalidRequest: its id is in use.
        """
        prompt, params = request.prompt_token_ids, request.params
        if request.request_id in self._requests:
            raise InvalidRequest(f"request id {request.request_id} is in use", "request_id")
        limit = self._config.max_total_tokens
        max_num_tokens = limit if params.max_tokens is None else len(prompt) + params.max_tokens
        if max_num_tokens > limit or len(prompt) >= limit:
            raise ContextTooLong(f"{len(prompt)} prompt tokens and {params.max_tokens or 1} output tokens exceed {limit}", "prompt")
        if not self._tables.can_ever_hold(max_num_tokens - 1):  # the last token is never computed
            raise ContextTooLong(f"the KV cache cannot hold a request of {max_num_tokens} tokens", "prompt")
        eos = frozenset() if params.ignore_eos else self._config.eos_token_ids
        stop_token_ids = eos.union(params.stop_token_ids)
        siblings = []
        for index in range(params.n):
            sample = Sample(request, index, self._num_arrived, now, max_num_tokens, stop_token_ids)
            sample.constrained = constrained
            sample.ready = ready
            siblings.append(sample)
            self._num_arrived += 1
        self._requests[request.request_id] = siblings
        self._waiting.extend(siblings)
        self._num_constrained += params.n if constrained else 0
        self._num_scoring += siblings[0].scores_prompt

    def set_ready(self, request_id: str) -> None:
        """Let a request be scheduled that was added as not ready; unknown ids are ignored."""
        for sample in self._requests.get(request_id, ()):
            sample.ready = True

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Forget a request, or one of its samples: it yields no further output. Unknown ids are ignored."""
        for sample in list(self._requests.get(request_id, ())):
            if index is None or sample.index == index:
                self._finish(sample)

    def schedule(self) -> ScheduledBatch | None:
        """Return the next step, None if nothing can run now: then update() or add() come first.

        Every running sample that has caught up gets its token, those behind share what is left of the budget, then waiting ones do.
        """
        self._step += 1
        rows, behind = self._schedule_decodes()
        num_decodes = len(rows)
        wanted = (sample.num_behind for sample in chain(behind, islice(self._waiting, len(self._free_slots))))
        scores = self._num_scoring > 0 and self._may_score(behind)
        num_tokens = tokens_for_prompts(self._config, num_decodes, wanted, scores)
        shared = PrefillBudget(num_tokens, self._needs(behind) if self._num_scoring else ())
        chunks = self._schedule_chunks(behind, shared)
        admitted, page_copies = self._admit_waiting(shared, scores)
        chunks += admitted
        if not rows and not chunks:
            return None
        rows += sorted(chunks, key=_is_long)
        constrained = self._num_constrained > 0 and any(row.samples and row.sample.constrained for row in rows)
        num_scored = sum(row.num_scored for row in rows) if self._num_scoring else 0
        return ScheduledBatch(rows, page_copies, num_decodes + sum(row.num_tokens for row in chunks), constrained, num_scored)

    def update(self, batch: ScheduledBatch, result: StepResult) -> list[TokenOutput]:
        """Take what a step sampled.

        Tokens of samples that have ended meanwhile are dropped and counted nowhere.

        Args:
            batch: the oldest in flight.
            result: of that batch.

        Returns:
            one output for each unfinished sample that the step sampled for.
        """
        outputs = []
        eos_token_ids = self._config.eos_token_ids
        sampled = zip(batch.rows, result.token_ids.tolist(), result.counts.tolist(), strict=False)  # the result may be padded
        for i, (row, token_ids, count) in enumerate(sampled):
            sample = row.sample
            sample.num_in_flight -= 1
            if sample.state is not FINISHED:
                output = receive(sample, token_ids[:count], eos_token_ids, result.logprobs, i) if row.samples else None
                sample.num_settled_tokens += row.num_tokens
                if sample.num_settled_tokens >= sample.settle_at:
                    self._tables.settle(sample)
                if output is not None:
                    outputs.append(output)
                    if output.finish_reason is not None:
                        self._finish(sample)
            if sample in self._leaving:
                self._vacate(sample)
        self._output_tokens += sum([len(output.token_ids) for output in outputs])
        return outputs

    def fail(self, batch: ScheduledBatch, message: str) -> list[TokenOutput]:
        """Give up a step whose computation failed, with all requests that it computed for.

        Returns:
            one output with FinishReason.ERROR for each of their unfinished samples.
        """
        outputs = []
        for row in batch.rows:
            row.sample.num_in_flight -= 1
        for row in batch.rows:
            if row.sample.state is not FINISHED:
                for sample in list(self._requests[row.sample.request.request_id]):
                    outputs.append(error_output(sample, message))
                    self._finish(sample)
            elif row.sample in self._leaving:
                self._vacate(row.sample)
        return outputs

    @property
    def has_work(self) -> bool:
        """Whether a sample runs, may run, or is held by a step in flight."""
        return bool(self._running or self._leaving) or any(sample.ready for sample in self._waiting)

    def stats(self) -> dict[str, int]:
        """Return the fields of EngineStats that are known here; pages are summed over the KV groups."""
        return {
            "num_running": len(self._running) + sum(sample.state is RUNNING for sample in self._leaving),
            "num_waiting": len(self._waiting),
            "num_pages_used": sum(pool.num_held for pool in self._tables.pools),
            "num_pages": sum(pool.num_pages for pool in self._tables.pools),
            "prefix_queries": self._prefix_queries,
            "prefix_hits": self._prefix_hits,
            "num_preemptions": self._num_preemptions,
            "prompt_tokens": self._prompt_tokens,
            "output_tokens": self._output_tokens,
        }

    def check_integrity(self) -> None:
        """Check that samples, slots and pages add up.

        Raises:
            AssertionError: naming what is wrong.
        """
        waiting, running, leaving = set(self._waiting), set(self._running), self._leaving
        unfinished = {sample for siblings in self._requests.values() for sample in siblings}
        for sample in waiting | running | leaving | unfinished:
            name = f"sample {sample.index} of {sample.request.request_id} ({sample.state.value})"
            assert (sample in unfinished) == (sample.state is not FINISHED), f"{name} is finished but listed, or the reverse"
            assert (sample in waiting) == (sample.state is WAITING), f"{name} is not where its state says"
            assert (sample in running or sample in leaving) or sample.state is not RUNNING, f"{name} is not where its state says"
            assert sample.num_in_flight > 0 or sample not in leaving, f"{name} is held by no step but was not released"
            assert (sample.slot >= 0) == (sample in running or sample in leaving), f"{name} has slot {sample.slot}"
        assert self._running == sorted(self._running, key=ARRIVAL), "running samples are out of order"
        assert list(self._waiting) == sorted(self._waiting, key=ARRIVAL), "waiting samples are out of order"
        slots = sorted([*self._free_slots, *(sample.slot for sample in running | leaving)])
        assert slots == list(range(self._config.max_batch_size)), f"slots are lost or held twice: {slots}"
        self._tables.check_integrity(running | leaving)

    # Parts of schedule, in order

    def _schedule_decodes(self) -> tuple[list[ScheduledRow], list[Sample]]:
        """Return a row for each running sample with one token to compute, and the samples that have more."""
        rows, behind = [], []
        for sample in list(self._running):
            if sample.num_tokens - sample.num_computed_tokens > 1:  # num_behind, without the call
                behind.append(sample)
            elif sample.state is RUNNING and (sample.num_computed_tokens < sample.room or self._make_room(sample, 1)):
                rows.append(self._take(sample, 1))
        return rows, behind

    def _needs(self, behind: list[Sample]) -> Iterator[tuple[int, bool]]:
        """Yield what PrefillBudget must know of each prompt: of those that run, then of those that may be admitted."""
        yield from ((sample.num_behind, sample.scores_prompt) for sample in behind)
        if len(self._free_slots) > (not behind):  # the first one that waits takes one
            # One that lacks memory cannot use what is held for it; siblings share the first one's prompt.
            for sample in self._waiting:
                if sample.ready and sample.lacking is None:
                    yield sample.num_tokens if sample.index == 0 else 1, sample.scores_prompt

    def _may_score(self, behind: list[Sample]) -> bool:
        """Whether one of the prompts is scored that this step may compute: of those that run, and of those that admission looks at."""
        looked_at = islice(self._waiting, len(self._free_slots) + MAX_LOOKED_AT)
        return any(sample.scores_prompt for sample in chain(behind, looked_at))

    def _schedule_chunks(self, behind: Iterable[Sample], budget: PrefillBudget) -> list[ScheduledRow]:
        """Return rows for the running samples that are behind, the earliest first, until the budget is used up."""
        rows = []
        for sample in behind:
            if sample.state is not RUNNING:  # preempted for one before it
                continue
            num_behind = sample.num_behind
            most = budget.most(num_behind, sample.scores_prompt)
            if most and (num_tokens := self._make_room(sample, most)):
                rows.append(self._take(sample, num_tokens))
                budget.take(num_behind, num_tokens)
        return rows

    def _admit_waiting(self, budget: PrefillBudget, scores: bool) -> tuple[list[ScheduledRow], list[tuple[int, int, int]]]:
        """Admit waiting samples while there are slots, budget and memory, scored ones where the step `scores`; return their rows and the
        pages to copy.
        """
        rows, page_copies = [], []
        put_back, skipped, num_passed = [], [], 0
        while self._waiting and self._free_slots and budget.left > 0 and len(put_back) < MAX_LOOKED_AT:
            sample = self._waiting.popleft()
            # What is left may be for short ones; and a slot that became free meanwhile may let a scored one come that nobody looked for.
            if budget.most(sample.num_tokens, sample.scores_prompt) == 0 or (sample.scores_prompt and not scores):
                put_back.append(sample)
                if sample.num_passed >= MAX_PASSED:
                    break
                continue
            source = self._prompt_source(sample)
            # A page each is left for the running ones, so that what is admitted now is not preempted at once.
            if self._must_wait(sample, source):
                put_back.append(sample)
            elif self._tables.admit(sample, source, len(self._running), page_copies):
                num_behind = sample.num_behind  # fewer than before, where a part is cached
                rows.append(self._start(sample, budget.most(num_behind, sample.scores_prompt)))
                budget.take(num_behind, rows[-1].num_tokens)
                num_passed = len(skipped)
            else:
                put_back.append(sample)
                skipped.append(sample)
                if sample.num_passed >= MAX_PASSED or len(skipped) == MAX_SKIPPED:
                    break
        self._waiting.extendleft(reversed(put_back))
        for sample in skipped[:num_passed]:
            sample.num_passed += 1
        return rows, page_copies

    # What happens to one sample, in order

    def _prompt_source(self, sample: Sample) -> Sample | None:
        """Return the running sample of the same request from which a waiting one can take the prompt, now or once it is computed."""
        if sample.scores_prompt:
            return None
        for sibling in self._requests[sample.request.request_id]:
            if sibling.state is RUNNING and self._tables.keeps_prompt(sibling, sample):
                return sibling
        return None

    def _must_wait(self, sample: Sample, source: Sample | None) -> bool:
        """Whether a waiting sample waits for something else than memory, so that it neither runs nor counts as passed."""
        prompt_is_coming = source is not None and source.prompt_step in (NEVER, self._step)
        return prompt_is_coming or not sample.ready or sample.num_in_flight > 0  # preempted, and its last token is not known yet

    def _start(self, sample: Sample, most: int) -> ScheduledRow:
        """Let an admitted sample run; return its first row."""
        sample.state = RUNNING
        sample.slot = self._free_slots.pop()
        insort(self._running, sample, key=ARRIVAL)
        if sample.queue_time < 0:
            self._count_start(sample)
        num_tokens = self._tables.grow(sample, min(most, sample.num_behind))
        return self._take(sample, num_tokens, new_slot=True)

    def _take(self, sample: Sample, num_tokens: int, new_slot: bool = False) -> ScheduledRow:
        """Return the row of a running sample's next tokens, for which it has pages."""
        start = sample.num_computed_tokens
        end = sample.num_computed_tokens = start + num_tokens
        num_prompt_tokens, total = sample.num_prompt_tokens, sample.num_tokens
        samples = end == total
        token_ids = sample.token_ids[start:end] or IN_FLIGHT
        sample.num_in_flight += 1
        if sample.prompt_step == NEVER and end >= num_prompt_tokens:
            sample.prompt_step = self._step
        if samples:
            sample.num_tokens = total + 1
            if total + 1 == sample.max_num_tokens:  # nothing is left to schedule: it leaves with its last token
                self._running.remove(sample)
                self._leaving.add(sample)
        num_scored = max(0, min(end, num_prompt_tokens - 1) - start) if sample.scores_prompt else 0
        return ScheduledRow(sample, start, num_tokens, token_ids, samples, new_slot, total - num_prompt_tokens, num_scored)

    def _make_room(self, sample: Sample, num_tokens: int) -> int:
        """Give a running sample pages for its next tokens, at the expense of later ones; return how many it can compute."""
        while not (fitting := self._tables.grow(sample, num_tokens)):
            last = self._running[-1]
            if self._leaving or last is sample:  # pages come free when a step in flight is collected, or others are done
                return 0
            self._preempt(last)
        return fitting

    def _preempt(self, sample: Sample) -> None:
        """Send a running sample back to wait; its tokens are computed again, but for what the prefix cache keeps."""
        self._num_preemptions += 1
        self._running.remove(sample)
        insort(self._waiting, sample, key=ARRIVAL)
        sample.state = WAITING
        self._vacate(sample)

    def _finish(self, sample: Sample) -> None:
        """End a sample, wherever it is."""
        siblings = self._requests[sample.request.request_id]
        siblings.remove(sample)
        if not siblings:
            del self._requests[sample.request.request_id]
        if sample.state is WAITING:
            self._waiting.remove(sample)
        elif sample not in self._leaving:
            self._running.remove(sample)
        self._num_constrained -= sample.constrained
        self._num_scoring -= sample.scores_prompt
        sample.state = FINISHED
        self._vacate(sample)

    def _vacate(self, sample: Sample) -> None:
        """Take a sample's slot and pages back, once no step in flight holds them."""
        if sample.num_in_flight:
            self._leaving.add(sample)
            return
        self._leaving.discard(sample)
        if sample.slot >= 0:
            self._tables.release(sample)
            self._free_slots.append(sample.slot)
            sample.slot = -1
            sample.prompt_step = NEVER

    def _count_start(self, sample: Sample) -> None:
        """Count a sample that is scheduled for the first time; the prompt counts with the first of its request."""
        sample.queue_time = max(0.0, self._clock() - sample.arrived_at)
        if sample.prompt_counted:
            return
        num_cached_tokens = sample.num_computed_tokens
        for sibling in self._requests[sample.request.request_id]:
            sibling.prompt_counted = True
            sibling.num_cached_tokens = num_cached_tokens
        self._prompt_tokens += sample.num_prompt_tokens
        if self._config.prefix_caching:
            self._prefix_queries += sample.num_prompt_tokens
            self._prefix_hits += num_cached_tokens


def _is_long(row: ScheduledRow) -> bool:
    return row.num_tokens > 1
