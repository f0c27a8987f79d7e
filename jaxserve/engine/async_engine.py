"""AsyncEngine: the thread that owns an Engine, its inbox, and the permits that bound what it accepts."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from jaxserve.engine.engine import Engine
from jaxserve.errors import EngineUnavailable, InvalidRequest, Overloaded
from jaxserve.request import EngineInfo, EngineStats, FinishReason, Request, TokenOutput
from jaxserve.scheduler import PageWatcher

logger = logging.getLogger(__name__)

INTEGRITY_INTERVAL = 10.0  # seconds between two checks while idle


class Sink(Protocol):
    """Where one client's outputs go. Called by the engine's thread: it must not block."""

    def put(self, outputs: list[TokenOutput]) -> None:
        """Take all outputs of one step for this sink's requests."""
        ...


@dataclass(frozen=True, slots=True)
class Abort:
    """An accepted request, or one sample of it, that nobody wants any longer."""

    request_id: str
    index: int | None


@dataclass(slots=True)
class Permit:
    """An accepted request: who gets its outputs, and which of its samples still run."""

    sink: Sink
    unfinished: set[int]


class AsyncEngine:
    """Runs an Engine in a thread of its own; every public method may be called from any thread.

    Args:
        engine: used by no one else from now on.
        max_concurrent_requests: permits; a request holds one from submit() until its last output or its abort.
        why_failed: asked where a step raised: a better reason than the error, or None.
    """

    def __init__(self, engine: Engine, max_concurrent_requests: int, why_failed: Callable[[], str | None] | None = None):
        self.info: EngineInfo = engine.info
        self.failure: str | None = None  # why the engine's thread ended, where a step raised
        self._engine = engine
        self._why_failed = why_failed
        self._max_concurrent_requests = max_concurrent_requests
        self._wake = threading.Condition()
        # Guarded by _wake.
        self._inbox: deque[Request | Abort] = deque()
        self._permits: dict[str, Permit] = {}
        self._closing = False
        self._stats = engine.stats()
        self._stats_wanted = False
        self._at_rest = False  # the engine's thread is not in the engine
        self._checked_at = 0.0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, sink: Sink) -> None:
        """Accept a request; its outputs go to the sink.

        Raises:
            InvalidRequest: it cannot be served, or its id is in use.
            Overloaded: no permit is free.
            EngineUnavailable: the engine is closing or has failed.
        """
        request.validate(self.info)
        with self._wake:
            if self.failure is not None:
                raise EngineUnavailable(self.failure)
            if self._closing:
                raise EngineUnavailable()
            if len(self._permits) >= self._max_concurrent_requests:
                raise Overloaded()
            if request.request_id in self._permits:
                raise InvalidRequest(f"request id {request.request_id} is in use", "request_id")
            self._permits[request.request_id] = Permit(sink, set(range(request.params.n)))
            self._inbox.append(request)
            self._wake.notify()

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Forget a request, or one of its samples; unknown ids are ignored."""
        with self._wake:
            permit = self._permits.get(request_id)
            if permit is None:
                return
            permit.unfinished -= permit.unfinished if index is None else {index}
            if not permit.unfinished:
                del self._permits[request_id]
            self._inbox.append(Abort(request_id, index))
            self._wake.notify_all()

    def stats(self) -> EngineStats:
        """Counters as of now where nothing runs; else as of the step after the last call: no snapshot is taken that nobody asked for."""
        with self._wake:
            if self._at_rest:
                return self._engine.stats()
            self._stats_wanted = True
            return self._stats

    def watch_pages(self, watcher: PageWatcher) -> None:
        """Tell a watcher which pages are stored, and from now on after each step what changed, before the step's outputs."""
        with self._wake:
            self._engine.page_watchers.add(watcher)
            if self._at_rest and self.failure is None:
                self._engine.page_watchers.tell()

    def unwatch_pages(self, watcher: PageWatcher) -> None:
        """Tell a watcher no more; who does not watch is ignored."""
        with self._wake:
            self._engine.page_watchers.remove(watcher)

    @property
    def num_permits_held(self) -> int:
        """Accepted requests that have not ended."""
        with self._wake:
            return len(self._permits)

    def drain(self, timeout: float) -> bool:
        """Wait until no accepted request is left.

        Args:
            timeout: seconds.

        Returns:
            whether that was reached.
        """
        with self._wake:
            return self._wake.wait_for(lambda: not self._permits or self.failure is not None, timeout)

    def fail(self, reason: str) -> None:
        """Give up for a reason that the engine's thread cannot see, as it may hang in a step; what was accepted ends with it."""
        with self._wake:
            if self.failure is not None:
                return
            self.failure = reason
        self._end_all()

    def close(self) -> None:
        """Stop accepting, end what runs and join the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._take_inbox():
                self._deliver(self._engine.step())
            self._engine.close()
        except Exception as error:  # A step that raised took the device state with it: nothing can go on.
            if self._why_failed is not None and (reason := self._why_failed()) is not None:
                self.fail(reason)
                return
            logger.exception("the engine's step failed")
            self.fail(f"{type(error).__name__}: {error}".splitlines()[0])
            return
        self._end_all()

    def _take_inbox(self) -> bool:
        """Hand the inbox to the engine, waiting while there is nothing to do; False when closing."""
        with self._wake:
            while not (self._inbox or self._engine.has_work or self._closing):
                self._check_integrity()
                self._at_rest = True
                self._wake.wait()
                self._at_rest = False
            if self._closing:
                return False
            items = list(self._inbox)
            self._inbox.clear()
        for item in items:
            if isinstance(item, Abort):
                self._engine.abort(item.request_id, item.index)
            else:
                self._engine.add_request(item)
        return True

    def _deliver(self, outputs: list[TokenOutput]) -> None:
        by_sink: dict[int, tuple[Sink, list[TokenOutput]]] = {}
        with self._wake:
            if self._stats_wanted:
                self._stats, self._stats_wanted = self._engine.stats(), False
            self._engine.page_watchers.tell()
            for output in outputs:
                permit = self._permits.get(output.request_id)
                if permit is None or output.index not in permit.unfinished:  # aborted while the step ran
                    continue
                by_sink.setdefault(id(permit.sink), (permit.sink, []))[1].append(output)
                if output.finish_reason is not None:
                    permit.unfinished.discard(output.index)
                    if not permit.unfinished:
                        del self._permits[output.request_id]
            if not self._permits:
                self._wake.notify_all()  # drain() waits for this
        for sink, sink_outputs in by_sink.values():
            sink.put(sink_outputs)

    def _end_all(self) -> None:
        message = self.failure or "the engine is closing"
        with self._wake:
            ended = list(self._permits.items())
            self._permits.clear()
            self._inbox.clear()
            self._at_rest = True
            self._wake.notify_all()
        for request_id, permit in ended:
            permit.sink.put([TokenOutput(request_id, index, [], [], FinishReason.ERROR, error=message) for index in permit.unfinished])

    def _check_integrity(self) -> None:
        now = time.monotonic()
        if now - self._checked_at < INTEGRITY_INTERVAL:
            return
        self._checked_at = now
        self._engine.check_integrity()
