"""Engine: schedules, dispatches, collects and updates, one step after the other.

**One step of lag.** Step n+1 is scheduled and dispatched before step n's tokens reach the host: the device feeds its own sampled
tokens to step n+1, and step n is collected while step n+1 runs. So a stop that only the token's value tells is seen one step late:
tokens computed after it are dropped and counted nowhere. Pages and slots are freed once, when no step in flight holds them, and at
most two steps are in flight. With `sync` a step is collected right after its dispatch; the tokens are the same.

**Constrained rows.** A batch without them is dispatched as a whole. Of a batch with one the forward is dispatched at once, and the
sampler when step n was collected and the masks of step n+1 could be filled, which happens while the forward runs.
"""

import time
from dataclasses import dataclass, replace
from typing import Any

from jaxserve.engine.constraints import Constraints
from jaxserve.engine.decode_gap import DecodeGap
from jaxserve.engine.durations import Durations
from jaxserve.engine.prompt_scores import PromptScores
from jaxserve.request import EngineInfo, EngineStats, Request, TokenOutput
from jaxserve.runner import ModelRunner
from jaxserve.scheduler import PageWatchers, ScheduledBatch, Scheduler

COMPILE_WAIT = 0.005  # seconds that a step with nothing else to do waits for a grammar


@dataclass(slots=True)
class InFlight:
    """A step on the device and the batch it computes."""

    batch: ScheduledBatch
    step: Any
    dispatched_at: float


class Engine:
    """One replica: a scheduler and a model runner. Not thread-safe; one thread owns it.

    Args:
        runner: the device half, warmed up.
        scheduler: the host half, made for the runner's KV groups.
        info: what front ends are told.
        sync: collect each step at once.
        decode_gap: observes step times and bounds prefill chunks while streams decode.
        constraints: the grammars of requests; without them info.no_grammars must say why.
    """

    def __init__(
        self,
        runner: ModelRunner,
        scheduler: Scheduler,
        info: EngineInfo,
        *,
        sync: bool = False,
        decode_gap: DecodeGap | None = None,
        constraints: Constraints | None = None,
    ):
        self.info = info
        self._runner = runner
        self._scheduler = scheduler
        self._sync = sync
        self._decode_gap = decode_gap
        self._constraints = constraints
        self._prompt_scores = PromptScores()
        # What is on the device.
        self._in_flight: InFlight | None = None
        self._collected_at = 0.0
        # Of every step so far, by part: fields of EngineStats.
        self._schedule_times = Durations()
        self._dispatch_times = Durations()
        self._device_times = Durations()
        self._collect_times = Durations()
        self._num_steps = 0

    @property
    def has_work(self) -> bool:
        """Whether step() has anything to do."""
        return self._in_flight is not None or self._scheduler.has_work or (self._constraints is not None and self._constraints.compiling)

    @property
    def page_watchers(self) -> PageWatchers:
        """Who is told which pages are stored and removed, and are to be told between steps."""
        return self._scheduler.page_watchers

    def add_request(self, request: Request) -> None:
        """Queue a request.

        Raises:
            InvalidRequest: it cannot be served; nothing was queued.
        """
        request.validate(self.info)
        constrained = request.params.grammar is not None
        self._scheduler.add(request, time.monotonic(), constrained=constrained, ready=not constrained)
        if request.params.prompt_logprobs is not None:
            self._prompt_scores.add(request)
        if constrained:
            assert self._constraints is not None, "info.no_grammars must say that there are no constraints"
            self._constraints.add(request)

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Forget a request, or one of its samples: no further output; its pages are free when no step in flight holds them.

        Unknown ids are ignored.
        """
        self._scheduler.abort(request_id, index)
        if self._constraints is not None:
            self._constraints.forget(request_id, index)
        if not index:
            self._prompt_scores.forget(request_id)

    def step(self) -> list[TokenOutput]:
        """Schedule and dispatch one step, collect the one before.

        Returns:
            the outputs of the collected step, in no particular order.
        """
        refused = self._take_compiled()
        batch = self._schedule()
        dispatched = self._dispatch(batch) if batch is not None else None
        outputs = self._finish(self._in_flight) if self._in_flight is not None else []
        outputs += refused
        self._in_flight = None
        if dispatched is not None and dispatched.batch.constrained:
            outputs += self._sample(dispatched)
        self._in_flight = dispatched  # not before: what could not be sampled cannot be collected by close()
        if dispatched is not None and self._sync:
            outputs += self._finish(dispatched)
            self._in_flight = None
        return outputs

    def close(self) -> None:
        """Collect what is still in flight, for nobody, and compile no more grammars: the runner can serve another engine."""
        if self._in_flight is not None:
            self._finish(self._in_flight)
            self._in_flight = None
        if self._constraints is not None:
            self._constraints.close()

    def stats(self) -> EngineStats:
        """Counters and gauges as of now."""
        return replace(
            EngineStats(**self._scheduler.stats(), **self._runner.stats()),  # pyright: ignore[reportArgumentType]
            num_steps=self._num_steps,
            schedule_seconds=self._schedule_times.seconds,
            dispatch_seconds=self._dispatch_times.seconds,
            device_seconds=self._device_times.seconds,
            collect_seconds=self._collect_times.seconds,
            schedule_counts=tuple(self._schedule_times.counts),
            dispatch_counts=tuple(self._dispatch_times.counts),
            device_counts=tuple(self._device_times.counts),
            collect_counts=tuple(self._collect_times.counts),
        )

    def check_integrity(self) -> None:
        """Raise AssertionError where pages, slots or references do not add up."""
        self._scheduler.check_integrity()

    def _take_compiled(self) -> list[TokenOutput]:
        """Let requests be scheduled whose grammars are compiled; return the last outputs of those that have none."""
        if self._constraints is None or not self._constraints.compiling:
            return []
        if self._in_flight is None and not self._scheduler.has_work:
            self._constraints.wait(COMPILE_WAIT)
        ready, refused = self._constraints.take_compiled()
        for request_id in ready:
            self._scheduler.set_ready(request_id)
        return self._ended(refused)

    def _schedule(self) -> ScheduledBatch | None:
        begin = time.monotonic()
        batch = self._scheduler.schedule()
        if batch is not None:
            self._schedule_times.observe(time.monotonic() - begin)
        return batch

    def _dispatch(self, batch: ScheduledBatch) -> InFlight:
        begin = time.monotonic()
        step = self._runner.forward(batch) if batch.constrained else self._runner.dispatch(batch)
        self._num_steps += 1
        now = time.monotonic()
        self._dispatch_times.observe(now - begin)
        return InFlight(batch, step, now)

    def _sample(self, dispatched: InFlight) -> list[TokenOutput]:
        """Sample a step under its masks; return the last outputs of samples for which the masks leave nothing."""
        assert self._constraints is not None
        masks, ended = self._constraints.fill(dispatched.batch)
        self._runner.sample(dispatched.step, masks)
        return self._ended(ended)

    def _ended(self, outputs: list[TokenOutput]) -> list[TokenOutput]:
        """Take samples out of the schedule that ended by their grammar."""
        for output in outputs:
            self._scheduler.abort(output.request_id, output.index)
        self._prompt_scores.tell(outputs)
        return outputs

    def _finish(self, step: InFlight) -> list[TokenOutput]:
        begin = time.monotonic()
        result = self._runner.collect(step.step)
        now = time.monotonic()
        self._collect_times.observe(now - begin)
        on_device = now - max(step.dispatched_at, self._collected_at)
        self._device_times.observe(on_device)
        if self._decode_gap is not None:
            self._decode_gap.observe(step.batch.num_tokens, on_device)
        self._collected_at = now
        if result.scored is not None:
            self._prompt_scores.take(step.batch, result.scored)
        outputs = self._scheduler.update(step.batch, result)
        self._prompt_scores.tell(outputs)
        if step.batch.constrained:
            assert self._constraints is not None
            for output in outputs:
                if output.finish_reason is not None:
                    self._constraints.forget(output.request_id, output.index)
        return outputs
