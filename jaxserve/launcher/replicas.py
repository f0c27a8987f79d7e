"""Replicas: engine processes for a script, without a launcher and without HTTP."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from queue import SimpleQueue

from jaxserve.config import EngineOptions, ModelOptions, ServerOptions
from jaxserve.errors import EngineUnavailable, GenerationFailed, JaxserveError
from jaxserve.launcher.engine_group import EngineGroup
from jaxserve.request import EngineInfo, EngineStats, Request, TokenOutput
from jaxserve.rpc.client import Submission

NO_LIMIT = 2**31 - 1
FATE_TIME = 5.0  # seconds in which a process whose stream broke should have ended


class Replicas:
    """An EngineGroup, asked by one thread. It ends with close(), and whenever this process ends, however it does.

    Args:
        model, engine: options; the mesh says how many.

    Attributes:
        info: what the engines have in common.

    Raises:
        StartupError: one of them cannot start; the message says why in one line.
    """

    info: EngineInfo

    def __init__(self, model: ModelOptions, engine: EngineOptions):
        # Whoever asks knows how much is in flight; refusals are for a server's clients.
        engine = replace(engine, max_concurrent_requests=NO_LIMIT)
        self._group = EngineGroup(model, engine, ServerOptions(log_level="warning"))
        self._outputs: SimpleQueue[TokenOutput | GenerationFailed] = SimpleQueue()
        self._failure: GenerationFailed | None = None
        self._ready: Future[None] = Future()
        self._loop = asyncio.new_event_loop()
        # Of the event loop's thread.
        self._submissions: dict[str, Submission] = {}
        self._closing = asyncio.Event()
        # The kernel ends the engines when the thread ends that started them (launcher.child), so it lives as long as they.
        self._thread = threading.Thread(target=self._run, name="replicas", daemon=True)
        self._thread.start()
        try:
            self._ready.result()
        except BaseException:
            self.close()
            raise
        self.info = self._group.router.info

    def submit(self, request: Request) -> None:
        """Send a validated request, whose id is new, to the replica that Router prefers. Raises GenerationFailed if one has ended."""
        if self._failure is not None:
            raise self._failure
        self._call(self._submit, request)

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Forget a request or one of its samples; unknown ids are ignored."""
        self._call(self._abort, request_id, index)

    def read(self) -> list[TokenOutput]:
        """Wait for outputs; there must be a request in flight.

        Returns:
            at least one, in the order of each sample.

        Raises:
            GenerationFailed: a replica has ended, and with it what it was asked.
        """
        if self._failure is not None:
            raise self._failure
        items = [self._outputs.get()]
        while not self._outputs.empty():
            items.append(self._outputs.get())
        outputs = [item for item in items if isinstance(item, TokenOutput)]
        if len(outputs) < len(items):
            self._failure = next(item for item in items if isinstance(item, GenerationFailed))
            raise self._failure
        return outputs

    def stats(self) -> list[EngineStats]:
        """Counters of each replica, as of at most a second ago."""
        return [client.stats for client in self._group.router.clients]

    def close(self) -> None:
        """End the processes; what is in flight is lost. May be called again."""
        self._call(self._closing.set)
        if threading.current_thread() is not self._thread:  # a collection of garbage may come by in any thread
            self._thread.join()
        self._group.remove()

    def _call(self, function: Callable[..., object], *arguments: object) -> None:
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(function, *arguments)

    # The rest runs in the event loop's thread.

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        closing = asyncio.create_task(self._closing.wait())
        try:
            await self._group.start(self._closing.is_set)
            self._ready.set_result(None)
            ends = asyncio.create_task(self._group.ends())
            await asyncio.wait([closing, ends], return_when=asyncio.FIRST_COMPLETED)
            for end in ends.result() if ends.done() else ():
                self._outputs.put(GenerationFailed(end))
            await closing
            ends.cancel()
        except Exception as error:  # raised in the thread that waits until all are ready
            self._ready.set_exception(error)
        finally:
            closing.cancel()
            await self._group.end()

    def _submit(self, request: Request) -> None:
        submission = self._submissions[request.request_id] = _Queued(request, self)
        try:
            self._group.router.send(submission)
        except EngineUnavailable as error:
            submission.fail(error)

    def _abort(self, request_id: str, index: int | None) -> None:
        if (submission := self._submissions.get(request_id)) is not None:
            submission.abort(index)
            if not submission.wanted:
                del self._submissions[request_id]

    def take(self, submission: Submission, output: TokenOutput) -> None:
        """Hand on an output (called by the submission)."""
        if not submission.wanted:
            self._submissions.pop(submission.request.request_id, None)
        self._outputs.put(output)

    def fail(self, submission: Submission, error: JaxserveError) -> None:
        """Hand on why a request cannot be finished (called by the submission)."""
        self._submissions.pop(submission.request.request_id, None)
        # Where a stream broke, the fate of the process says more, and is known before long.
        delay = FATE_TIME if isinstance(error, EngineUnavailable) else 0.0
        self._loop.call_later(delay, self._outputs.put, GenerationFailed(str(error)))


class _Queued(Submission):
    """A request whose outputs go into the queue, of all requests the same."""

    def __init__(self, request: Request, replicas: Replicas):
        super().__init__(request)
        self._replicas = replicas

    def _keep(self, output: TokenOutput) -> bool:
        self._replicas.take(self, output)
        return output.finish_reason is None

    def fail(self, error: JaxserveError) -> None:
        """Hand on why there are no more."""
        self._unfinished.clear()
        self._replicas.fail(self, error)
