"""EngineClient: one engine, as an http process sees it."""

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path

import grpc

from jaxserve.errors import EngineUnavailable, GenerationFailed, InvalidRequest, JaxserveError, Overloaded
from jaxserve.hosts.wire import CHANNEL_OPTIONS
from jaxserve.request import MAX_SAMPLES, EngineInfo, EngineStats, FinishReason, Request, TokenOutput
from jaxserve.rpc import engine_pb2 as pb
from jaxserve.rpc.handshake import StreamKey, introduce
from jaxserve.rpc.prefix_index import PrefixIndex
from jaxserve.rpc.wire import error_from, generate_message, info_from, outputs_from, stats_from

logger = logging.getLogger(__name__)

METHOD = "/jaxserve.rpc.Engine/Connect"
RECONNECT_INTERVAL = 0.2  # seconds
CONNECT_TIME = 5.0  # seconds until an address that does not answer is given up
SOCKET_POLL_INTERVAL = 0.02  # seconds
HANG_UP_TIME = 0.5  # seconds
LOOKAHEAD_BYTES = 4096  # a step of 256 samples
REMOTE_LOOKAHEAD_BYTES = 65536  # so much a round trip: over a network a step with log probabilities should not take several
# Outputs of one request that may wait for whoever reads it; beyond, the request is aborted.
MAX_UNREAD_OUTPUTS = 8192


class Submission:
    """A request on its way to an engine, and what comes back of it: of one engine at a time, of another where the first was lost early.

    Attributes:
        request: what was asked for.
        begun: whether any output came; from then on no other engine can take it over.
        lost_by: replicas that ended, or never took it, while they had it.
        refused_by: replicas that had no room for it.
    """

    def __init__(self, request: Request):
        self.request = request
        self.begun = False
        self.lost_by: set[int] = set()
        self.refused_by: set[int] = set()
        self._unfinished = set(range(request.params.n))
        self._client: EngineClient | None = None
        self._number = 0

    def place(self, client: "EngineClient", number: int) -> None:
        """Know which engine has it, and under which number (client only)."""
        self._client = client
        self._number = number

    @property
    def wanted(self) -> bool:
        """Whether any sample has neither ended nor been given up."""
        return bool(self._unfinished)

    def abort(self, index: int | None = None) -> None:
        """Give up the request, or one of its samples; no further output of it is read."""
        ended = set(self._unfinished) if index is None else self._unfinished & {index}
        self._unfinished -= ended
        if ended and self._client is not None:
            self._client.abort(self._number, index, ended)
            if not self._unfinished:
                self._client.settle(self._number)

    def take(self, output: TokenOutput) -> bool:
        """Take a new output (client only); return whether its sample goes on."""
        if output.index not in self._unfinished:
            return False
        if not self.begun:
            self.begun = True
            if self._client is not None:
                self._client.settle(self._number)
        output.request_id = self.request.request_id
        if output.finish_reason is not None:
            self._unfinished.discard(output.index)
        return self._keep(output)

    def _keep(self, output: TokenOutput) -> bool:
        """Do with an output what is to be done; return whether its sample goes on."""
        raise NotImplementedError

    def fail(self, error: JaxserveError) -> None:
        """No more outputs will come, and why (client and router only)."""
        raise NotImplementedError


class Generation(Submission):
    """A request with one reader on the event loop. Made by Router.submit() and EngineClient.submit()."""

    def __init__(self, request: Request):
        super().__init__(request)
        self._unread: list[TokenOutput] = []
        self._error: JaxserveError | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def finished(self) -> bool:
        """Whether read() has nothing more to give."""
        return not self._unfinished and not self._unread and self._error is None

    async def read(self) -> list[TokenOutput]:
        """Wait for new outputs.

        Returns:
            at least one output, in order; several where the reader is slower than the engine. Empty once all samples have ended.

        Raises:
            Overloaded, InvalidRequest, EngineUnavailable: the engine did not accept the request.
            EngineUnavailable: it was accepted, and the engine ended.
            InvalidRequest: it was accepted, and then its grammar could not be compiled or followed.
            GenerationFailed: it was accepted and cannot be finished.
        """
        while not self._unread:
            if self._error is not None:
                raise self._error
            if not self._unfinished:
                return []
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        outputs = self._unread
        self._unread = []
        return outputs

    def abort(self, index: int | None = None) -> None:
        """Give up the request, or one of its samples; no further output of it is read."""
        super().abort(index)
        if not self._unfinished:
            self._wake()

    def _keep(self, output: TokenOutput) -> bool:
        """For the reader."""
        if output.finish_reason is not None and (error := self._error_of(output)) is not None:
            self.abort()
            self.fail(error)
            return False
        self._unread.append(output)
        if len(self._unread) > MAX_UNREAD_OUTPUTS:
            self.abort()
            self._unread.clear()
            self.fail(GenerationFailed("the answer was not read"))
            return False
        self._wake()
        return output.finish_reason is None

    def fail(self, error: JaxserveError) -> None:
        """Let the reader raise this after the outputs that came before (client and router only)."""
        self._error = self._error or error
        self._unfinished.clear()
        self._wake()

    def _error_of(self, output: TokenOutput) -> JaxserveError | None:
        if output.finish_reason is FinishReason.INVALID:
            grammar = self.request.params.grammar
            return InvalidRequest(output.error, grammar.param if grammar is not None else None)
        return GenerationFailed(output.error) if output.finish_reason is FinishReason.ERROR else None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class EngineClient:
    """One engine, reached over its unix socket or on another host; connects, and connects again whenever the engine comes back.

    Args:
        place: path of the socket where EngineServer listens; or of a file that holds its "ADDRESS:PORT" while it is there.
        replica: which of the engines it is.
        key: of an engine on another host.

    Attributes:
        info: what the engine told of itself, None before it was first reached.
        stats: its latest counters.
        available: whether it can be asked now.
        leaving: whether it ends as soon as it has finished what it was asked.
        num_losses: how often it could be asked no longer.
        routes_by_prefix: set before start(), has the engine tell which pages it holds.
        prefixes: what it holds, and what it is computing for this client; empty unless routes_by_prefix.
        rescue: given a submission that has not begun, and why this engine will not begin it, tells whether another one will.
    """

    def __init__(self, place: Path, replica: int = 0, key: StreamKey | None = None):
        self.replica = replica
        self.info: EngineInfo | None = None
        self.stats = EngineStats()
        self.available = False
        self.leaving = False
        self.num_losses = 0
        self.routes_by_prefix = False
        self.prefixes = PrefixIndex()
        self.rescue: Callable[[Submission, EngineUnavailable | Overloaded, int], bool] = lambda submission, error, replica: False
        self._place = place
        self._key = key
        self._numbers = itertools.count(1)
        self._connecting: asyncio.Task[None] | None = None
        # Of the stream that is open now.
        self._samples: dict[int, Submission] = {}
        self._computing: dict[int, Sequence[int]] = {}  # names of the pages of prompts whose first output is awaited
        self._outbox: asyncio.Queue[pb.ClientMessage | None] = asyncio.Queue()
        self._closing = False

    @property
    def num_in_flight(self) -> int:
        """Samples of this client that run or wait in the engine."""
        return len(self._samples)

    def start(self) -> None:
        """Connect in the background."""
        self._connecting = asyncio.create_task(self._run(), name=f"engine-{self.replica}")

    async def close(self) -> None:
        """Hang up; what is in flight fails."""
        if self._connecting is None:
            return
        self._closing = True
        if self.available:
            # The engine hears of an end, and ends the stream itself: breaking it off while it writes would be an error there.
            self._outbox.put_nowait(None)
            await asyncio.wait([self._connecting], timeout=HANG_UP_TIME)
        self._connecting.cancel()
        await asyncio.gather(self._connecting, return_exceptions=True)

    def submit(self, request: Request) -> Generation:
        """Send a validated request; whether the engine accepts it is told by Generation.read().

        Raises:
            EngineUnavailable: the engine is not there (yet).
        """
        generation = Generation(request)
        self.send(generation)
        return generation

    def send(self, submission: Submission, pages: Sequence[int] = ()) -> None:
        """Send a request that no engine has now; `pages` are its prompt's, by short_names(). Raises EngineUnavailable."""
        if not self.available:
            raise EngineUnavailable
        number = next(self._numbers)
        if pages:
            self._computing[number] = pages
            self.prefixes.expect(pages)
        submission.place(self, number)
        self._samples.update((number * MAX_SAMPLES + index, submission) for index in range(submission.request.params.n))
        self._outbox.put_nowait(generate_message(number, submission.request))

    async def generate(self, request: Request) -> AsyncIterator[TokenOutput]:
        """Submit a request and iterate over its outputs; leaving the iteration aborts it.

        Raises:
            EngineUnavailable, Overloaded, InvalidRequest: it was not accepted.
            GenerationFailed: it was accepted and cannot be finished.
        """
        generation = self.submit(request)
        try:
            while outputs := await generation.read():
                for output in outputs:
                    yield output
        finally:
            generation.abort()

    def fail_all(self, error: JaxserveError) -> None:
        """Let everything that is in flight fail, here and in the engine."""
        for submission in set(self._samples.values()):
            submission.abort()
            submission.fail(error)

    def abort(self, number: int, index: int | None, indices: set[int]) -> None:
        """Forget samples of a request (called by its Submission)."""
        for each in indices:
            self._samples.pop(number * MAX_SAMPLES + each, None)
        self._outbox.put_nowait(pb.ClientMessage(abort=pb.Abort(number=number, index=index)))

    async def _run(self) -> None:
        options = [
            ("grpc.max_receive_message_length", -1),
            ("grpc.max_send_message_length", -1),
            ("grpc.enable_http_proxy", 0),
            # Little is sent ahead of the reader, so that where it is slower than the engine the server merges steps: what waits here
            # would cost it a wakeup and a socket write for every token.
            ("grpc.http2.lookahead_bytes", LOOKAHEAD_BYTES if self._key is None else REMOTE_LOOKAHEAD_BYTES),
            ("grpc.http2.bdp_probe", 0),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 500),
        ]
        if self._key is not None:
            # Where engines come and go on other hosts, another one may get the port: there are no connections that others share.
            options += [
                *CHANNEL_OPTIONS,
                ("grpc.use_local_subchannel_pool", 1),
                ("grpc.min_reconnect_backoff_ms", int(CONNECT_TIME * 1000)),
            ]
        while not self._closing:
            while (target := self._target()) is None:  # gRPC would look for a socket half a second later
                await asyncio.sleep(SOCKET_POLL_INTERVAL)
            async with grpc.aio.insecure_channel(target, options) as channel:
                connect = channel.stream_stream(
                    METHOD, request_serializer=pb.ClientMessage.SerializeToString, response_deserializer=pb.EngineMessage.FromString
                )
                try:
                    await self._converse(connect(wait_for_ready=self._key is None))
                except grpc.aio.AioRpcError as error:
                    if self.available:
                        logger.warning("engine %d: stream lost: %s", self.replica, error.details())
                except TimeoutError:
                    logger.warning("engine %d does not answer at %s", self.replica, target)
                finally:
                    self._lose_all()
            if not self._closing:
                await asyncio.sleep(RECONNECT_INTERVAL)

    def _target(self) -> str | None:
        """Where the engine listens, in gRPC's words; None while it is not known."""
        if self._key is None:
            return f"unix:{self._place}" if self._place.exists() else None
        try:
            return self._place.read_text() or None
        except FileNotFoundError:
            return None

    def settle(self, number: int) -> None:
        """A request's prompt is computed, and the engine has told its pages, or it will not be (called by its Submission)."""
        if (pages := self._computing.pop(number, None)) is not None:
            self.prefixes.settle(pages)

    def _lose_all(self) -> None:
        """The engine is gone: what has not begun goes elsewhere, the rest fails."""
        self.num_losses += self.available and not self.leaving
        self.available = self.leaving = False
        self.prefixes = PrefixIndex()
        self._computing.clear()
        lost = dict.fromkeys(self._samples.values())  # in the order in which they were sent
        self._samples.clear()
        # Not a failure of the request: what has told its client nothing yet may be sent again, and the client hears so.
        num_failed = sum(not self._rescued(each, EngineUnavailable("the engine process ended while the request ran")) for each in lost)
        if lost and not self._closing:
            logger.warning("engine %d: of %d requests %d go to other replicas", self.replica, len(lost), len(lost) - num_failed)

    def _rescued(self, submission: Submission, error: JaxserveError) -> bool:
        if isinstance(error, EngineUnavailable | Overloaded) and not submission.begun and self.rescue(submission, error, self.replica):
            return True
        submission.fail(error)
        return False

    async def _converse(self, call: grpc.aio.StreamStreamCall) -> None:
        writing: asyncio.Task[None] | None = None
        try:
            if self._key is not None and not await introduce(call, self._key):
                logger.warning("engine %d: who listens at its address has another cluster secret, or is another engine", self.replica)
                return
            while isinstance(message := await call.read(), pb.EngineMessage):
                if message.HasField("info"):
                    if self.num_losses:
                        logger.info("engine %d: reached again", self.replica)
                    self.info = info_from(message.info)
                    if self._key is not None:
                        self.info = replace(self.info, model_path="")  # a path of another host's
                    self.prefixes = PrefixIndex(self.info.page_size, self.info.windows)
                    self._outbox = asyncio.Queue()
                    if self.routes_by_prefix:
                        self._outbox.put_nowait(pb.ClientMessage(watch_pages=pb.WatchPages()))
                    writing = asyncio.create_task(self._write(call, self._outbox))
                    self.available = True
                self._receive(message)
            await call.code()  # the server has said its last word, and may not have ended yet
        finally:
            call.cancel()
            if writing is not None:
                writing.cancel()
                await asyncio.gather(writing, return_exceptions=True)

    async def _write(self, call: grpc.aio.StreamStreamCall, outbox: asyncio.Queue[pb.ClientMessage | None]) -> None:
        while (message := await outbox.get()) is not None:
            await call.write(message)
        await call.done_writing()

    def _receive(self, message: pb.EngineMessage) -> None:
        self.leaving = message.leaving
        if message.HasField("stats"):
            self.stats = stats_from(message.stats)
        for changes in message.page_changes:
            self.prefixes.change(changes.group, changes.stored, changes.removed)
        for rejection in message.rejections:
            self._reject(rejection.number, error_from(rejection))
        if message.HasField("outputs"):
            samples = self._samples
            for sample, output in outputs_from(message.outputs):
                if (submission := samples.get(sample)) is not None and not submission.take(output):
                    samples.pop(sample, None)

    def _reject(self, number: int, error: JaxserveError) -> None:
        first = number * MAX_SAMPLES
        if (submission := self._samples.get(first)) is None:
            return
        for index in range(submission.request.params.n):
            self._samples.pop(first + index, None)
        self.settle(number)
        self._rescued(submission, error)
