"""EngineServer: lends an engine to http processes over gRPC, one bidirectional stream each.

gRPC costs 0.3 ms of CPU a message in the engine's own GIL, so a stream sends at most one message per engine step, and merges steps when
its reader is slower than that. The asyncio server is used because a message crosses fewer threads in it than in the synchronous one:
0.31 against 0.63 ms, and half the delay, measured beside an engine thread that never rests.
"""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import grpc

from jaxserve.errors import EngineUnavailable, JaxserveError, StartupError
from jaxserve.hosts.addresses import join_address
from jaxserve.hosts.wire import CHANNEL_OPTIONS, stop_server
from jaxserve.page_changes import PageChanges
from jaxserve.request import EngineInfo, EngineStats, FinishReason, Request, TokenOutput
from jaxserve.rpc import engine_pb2 as pb
from jaxserve.rpc.handshake import StreamKey, admit
from jaxserve.rpc.untold_pages import UntoldPages
from jaxserve.rpc.wire import OutputColumns, info_message, rejection_message, request_from, stats_message

logger = logging.getLogger(__name__)

SERVICE = "jaxserve.rpc.Engine"
STATS_INTERVAL = 0.5  # seconds
PAGES_INTERVAL = 0.1  # seconds between two looks for changed pages, where there are no outputs with which they are told
# Outputs that may wait for a reader before its stream is broken: 256 samples for 256 steps.
MAX_PENDING_OUTPUTS = 65536


class ServedEngine(Protocol):
    """What is needed of an engine (engine.AsyncEngine has it); all methods may be called from any thread."""

    info: EngineInfo
    failure: str | None  # why it can do nothing more

    def submit(self, request: Request, sink: Any) -> None:
        """Accept a request; `sink.put(outputs)` is called once a step. Raises InvalidRequest, Overloaded, EngineUnavailable."""
        ...

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Forget a request or one of its samples."""
        ...

    def stats(self) -> EngineStats:
        """Counters as of the last step."""
        ...

    def watch_pages(self, watcher: Any) -> None:
        """Call `watcher.put_pages(changes)` with what is stored, then with what changed, each time before the outputs of that step."""
        ...

    def unwatch_pages(self, watcher: Any) -> None:
        """Call it no more."""
        ...


class EngineServer:
    """Serves one engine: on a unix socket, or to another host.

    Args:
        engine: what to serve.
        place: path of the socket, which is made with mode 0600 (its folder should be private too); or an IP address of this host.
        key: who connects to an IP address must prove to know it.

    Attributes:
        address: "ADDRESS:PORT" where it listens for another host, once it does; the kernel chooses the port.
    """

    def __init__(self, engine: ServedEngine, place: Path | str, key: StreamKey | None = None):
        self.address = ""
        self._engine = engine
        self._place = place
        self._key = key
        self._leaving = False
        self._streams: set[_Stream] = set()
        # A token id takes at most 5 bytes; the rest of a request is far below 1 MiB.
        receive_limit = 5 * engine.info.max_total_tokens + 2**20
        options = [("grpc.max_receive_message_length", receive_limit), ("grpc.max_send_message_length", -1), ("grpc.so_reuseport", 0)]
        if key is not None:
            options += [*CHANNEL_OPTIONS, ("grpc.http2.max_ping_strikes", 0)]
        self._server = grpc.aio.server(options=options)
        handler = grpc.stream_stream_rpc_method_handler(self._connect, pb.ClientMessage.FromString, pb.EngineMessage.SerializeToString)
        self._server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, {"Connect": handler})])

    async def start(self) -> None:
        """Listen.

        Raises:
            StartupError: the address is not this host's.
        """
        if isinstance(self._place, str):
            try:
                port = self._server.add_insecure_port(join_address(self._place, 0))
            except RuntimeError:
                raise StartupError(f"an engine cannot listen at {self._place}, by which this host reaches host 0") from None
            self.address = join_address(self._place, port)
            await self._server.start()
            return
        self._place.unlink(missing_ok=True)
        self._server.add_insecure_port(f"unix:{self._place}")
        await self._server.start()
        self._place.chmod(0o600)

    def leave(self) -> None:
        """Tell all clients to send no more requests."""
        self._leaving = True
        for stream in self._streams:
            stream.tell_leaving()

    async def stop(self, grace: float) -> None:
        """Accept no more streams, end those that there are, and break what is left of them after `grace` seconds."""
        for stream in self._streams:
            stream.end()
        await stop_server(self._server, grace)
        if isinstance(self._place, Path):
            self._place.unlink(missing_ok=True)

    async def _connect(self, messages: AsyncIterator[pb.ClientMessage], context: Any) -> None:
        if self._key is not None and not await admit(aiter(messages), context, self._key):
            logger.warning("%s did not show that it knows the cluster secret", context.peer())
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "another cluster secret")
        stream = _Stream(self._engine, asyncio.get_running_loop(), self._leaving)
        self._streams.add(stream)
        try:
            await context.write(pb.EngineMessage(info=info_message(self._engine.info), stats=stats_message(self._engine.stats())))
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(stream.read(messages))
                tasks.create_task(stream.write(context))
                tasks.create_task(stream.watch())
        except* (_HungUp, grpc.aio.BaseError):  # the latter where a message was being sent when the client went
            pass
        except* _Stalled:
            logger.warning("an http process does not read its stream: its requests are aborted")
        finally:
            self._streams.discard(stream)
            stream.close()
        if stream.stalled.is_set():
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the stream was not read")


class _HungUp(Exception):
    """One end wants no more of the stream."""


class _Stalled(Exception):
    """The client does not read."""


@dataclass(slots=True)
class _Live:
    """A request that runs for a stream."""

    number: int
    unfinished: set[int]
    told: set[int] = field(default_factory=set)  # samples whose first output was sent


class _Stream:
    """One http process: its requests, and the outputs that wait to be sent to it.

    The engine's thread only appends to `_pending`, wakes the writer, and puts changed pages aside; all else runs on the event loop.
    """

    def __init__(self, engine: ServedEngine, loop: asyncio.AbstractEventLoop, leaving: bool):
        self.stalled = asyncio.Event()
        self._engine = engine
        self._loop = loop
        self._requests: dict[str, _Live] = {}
        self._request_ids: dict[int, str] = {}
        self._rejections: list[pb.Rejection] = []
        self._wake = asyncio.Event()
        self._hung_up = False
        self._ending = False
        self._leaving = leaving
        self._stats_at = 0.0
        self._pages_wanted = False
        # Shared with the engine's thread; each counter has one writer.
        self._pending: deque[list[TokenOutput]] = deque()
        self._num_put = 0
        self._num_taken = 0
        self._untold_pages = UntoldPages()

    @property
    def num_pending(self) -> int:
        """Outputs that the writer has not yet taken; a source that can wait may hold back."""
        return self._num_put - self._num_taken

    def put(self, outputs: list[TokenOutput]) -> None:
        """Take a step's outputs (engine's thread)."""
        self._num_put += len(outputs)
        stalled = self.num_pending > MAX_PENDING_OUTPUTS
        if stalled:
            self._pending.clear()
        else:
            self._pending.append(outputs)
            # The writer clears the flag before it takes what is pending, so an append that saw the flag set will be taken.
            if self._wake.is_set():
                return
        try:
            self._loop.call_soon_threadsafe((self.stalled if stalled else self._wake).set)
        except RuntimeError:  # the loop is closed: this process is ending
            self._pending.clear()

    def put_pages(self, changes: Sequence[PageChanges]) -> None:
        """Take what changed in each KV group (engine's thread); it waits for outputs to go with, PAGES_INTERVAL at most."""
        self._untold_pages.put(changes)

    def tell_leaving(self) -> None:
        """Have the client told, with what comes next, that the engine ends."""
        self._leaving = True
        self._wake.set()

    def end(self) -> None:
        """Send what is pending, and then no more."""
        self._ending = True
        self._wake.set()

    async def read(self, messages: AsyncIterator[pb.ClientMessage]) -> None:
        """Take requests and aborts until the client hangs up."""
        async for message in messages:
            if message.WhichOneof("message") == "generate":
                self._submit(message.generate)
            elif message.WhichOneof("message") == "abort":
                self._abort(message.abort)
            elif message.WhichOneof("message") == "watch_pages":
                self._pages_wanted = True
                self._engine.watch_pages(self)
                self._wake.set()
        self._hung_up = True
        self._wake.set()

    async def write(self, context: Any) -> None:
        """Send whatever is pending as one message, again and again; raise once the client has hung up, or this end shall.

        Only between two messages: gRPC takes it amiss if one is broken off.
        """
        tick_at = 0.0
        while not self._hung_up and (self._pending or not self._ending):
            try:
                async with asyncio.timeout_at(tick_at):
                    await self._wake.wait()
            except TimeoutError:
                pass
            woken = self._wake.is_set()
            self._wake.clear()
            message = pb.EngineMessage(leaving=self._leaving)
            if self._pending:
                message.outputs.CopyFrom(self._take_outputs())
            message.rejections.extend(self._rejections)
            self._rejections = []
            now = self._loop.time()
            if stats_due := now >= self._stats_at + STATS_INTERVAL:
                self._stats_at = now
                message.stats.CopyFrom(stats_message(self._engine.stats()))
            tick_at = self._stats_at + STATS_INTERVAL
            if self._pages_wanted:
                tick_at = min(tick_at, now + PAGES_INTERVAL)
                # After the outputs are taken, so that with a request's first output the pages of its prompt are told.
                message.page_changes.extend(self._untold_pages.take())
                if self._untold_pages.more:
                    self._wake.set()
            if woken or stats_due or message.page_changes:
                await context.write(message)
        raise _HungUp

    async def watch(self) -> None:
        """Raise once the client has not read for too long."""
        await self.stalled.wait()
        raise _Stalled

    def close(self) -> None:
        """Abort whatever still runs, and watch no more pages."""
        self._engine.unwatch_pages(self)
        for request_id in self._requests:
            self._engine.abort(request_id)
        self._requests.clear()

    def _submit(self, message: pb.Generate) -> None:
        request = request_from(message)
        # Known before it is submitted: the engine's thread may be faster than this one.
        self._requests[request.request_id] = _Live(message.number, set(range(request.params.n)))
        self._request_ids[message.number] = request.request_id
        try:
            self._engine.submit(request, self)
        except JaxserveError as error:
            self._forget(request.request_id)
            self._rejections.append(rejection_message(message.number, error))
            self._wake.set()

    def _abort(self, message: pb.Abort) -> None:
        if (request_id := self._request_ids.get(message.number)) is None:
            return
        if message.HasField("index"):
            self._engine.abort(request_id, message.index)
            self._end(request_id, message.index)
        else:
            self._engine.abort(request_id)
            self._forget(request_id)

    def _take_outputs(self) -> pb.Outputs:
        columns = OutputColumns()
        for _ in range(len(self._pending)):
            outputs = self._pending.popleft()
            self._num_taken += len(outputs)
            for output in outputs:
                if (live := self._requests.get(output.request_id)) is None or output.index not in live.unfinished:
                    continue  # aborted while the step ran
                if output.finish_reason is FinishReason.ERROR and not live.told and self._engine.failure is not None:
                    # The engine ends before it has begun this one: another replica can do it.
                    self._rejections.append(rejection_message(live.number, EngineUnavailable(output.error)))
                    self._forget(output.request_id)
                    continue
                columns.add(live.number, output, output.index not in live.told)
                live.told.add(output.index)
                if output.finish_reason is not None:
                    self._end(output.request_id, output.index)
        return columns.message()

    def _end(self, request_id: str, index: int) -> None:
        live = self._requests[request_id]
        live.unfinished.discard(index)
        if not live.unfinished:
            self._forget(request_id)

    def _forget(self, request_id: str) -> None:
        del self._request_ids[self._requests.pop(request_id).number]
