"""EngineClient: one engine, as an http process sees it."""

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import grpc

from jaxserve.errors import EngineUnavailable, GenerationFailed, InvalidRequest, JaxserveError
from jaxserve.request import MAX_SAMPLES, EngineInfo, EngineStats, FinishReason, Request, TokenOutput
from jaxserve.rpc import engine_pb2 as pb
from jaxserve.rpc.wire import error_from, generate_message, info_from, outputs_from, stats_from

logger = logging.getLogger(__name__)

METHOD = "/jaxserve.rpc.Engine/Connect"
RECONNECT_INTERVAL = 0.2  # seconds
LOOKAHEAD_BYTES = 4096  # a step of 256 samples
# Outputs of one request that may wait for whoever reads it; beyond, the request is aborted.
MAX_UNREAD_OUTPUTS = 8192


class Generation:
    """An accepted request on its way. Made by EngineClient.submit(); one reader.

    Attributes:
        request: what was asked for.
    """

    def __init__(self, client: "EngineClient", number: int, request: Request):
        self.request = request
        self._client = client
        self._number = number
        self._unfinished = set(range(request.params.n))
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
        ended = set(self._unfinished) if index is None else self._unfinished & {index}
        self._unfinished -= ended
        if ended:
            self._client.abort(self._number, index, ended)
        if not self._unfinished:
            self._wake()

    def take(self, output: TokenOutput) -> bool:
        """Keep an output for the reader (client only); return whether its sample goes on."""
        if output.index not in self._unfinished:
            return False
        output.request_id = self.request.request_id
        if output.finish_reason is not None:
            self._unfinished.discard(output.index)
            if (error := self._error_of(output)) is not None:
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
        """Let the reader raise this after the outputs that came before (client only)."""
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
    """One engine, reached over its unix socket; connects, and connects again whenever the engine comes back.

    Args:
        socket_path: where EngineServer listens.
        replica: which of the engines it is.

    Attributes:
        info: what the engine told of itself, None before it was first reached.
        stats: its latest counters.
        available: whether it can be asked now.
    """

    def __init__(self, socket_path: Path, replica: int = 0):
        self.replica = replica
        self.info: EngineInfo | None = None
        self.stats = EngineStats()
        self.available = False
        self._socket_path = socket_path
        self._numbers = itertools.count(1)
        self._connecting: asyncio.Task[None] | None = None
        # Of the stream that is open now.
        self._samples: dict[int, Generation] = {}
        self._outbox: asyncio.Queue[pb.ClientMessage] = asyncio.Queue()

    @property
    def num_in_flight(self) -> int:
        """Samples of this client that run or wait in the engine."""
        return len(self._samples)

    def start(self) -> None:
        """Connect in the background."""
        self._connecting = asyncio.create_task(self._run(), name=f"engine-{self.replica}")

    async def close(self) -> None:
        """Hang up; what is in flight fails."""
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.gather(self._connecting, return_exceptions=True)

    def submit(self, request: Request) -> Generation:
        """Send a validated request; whether the engine accepts it is told by Generation.read().

        Raises:
            EngineUnavailable: the engine is not there (yet).
        """
        if not self.available:
            raise EngineUnavailable
        number = next(self._numbers)
        generation = Generation(self, number, request)
        self._samples.update((number * MAX_SAMPLES + index, generation) for index in range(request.params.n))
        self._outbox.put_nowait(generate_message(number, request))
        return generation

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
        for generation in set(self._samples.values()):
            generation.abort()
            generation.fail(error)

    def abort(self, number: int, index: int | None, indices: set[int]) -> None:
        """Forget samples of a request (called by its Generation)."""
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
            ("grpc.http2.lookahead_bytes", LOOKAHEAD_BYTES),
            ("grpc.http2.bdp_probe", 0),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 500),
        ]
        async with grpc.aio.insecure_channel(f"unix:{self._socket_path}", options) as channel:
            connect = channel.stream_stream(
                METHOD, request_serializer=pb.ClientMessage.SerializeToString, response_deserializer=pb.EngineMessage.FromString
            )
            while True:
                try:
                    await self._converse(connect(wait_for_ready=True))
                except grpc.aio.AioRpcError as error:
                    logger.warning("engine %d: stream lost: %s", self.replica, error.details())
                finally:
                    self.available = False
                    # Not a failure of the request: what has told its client nothing yet may be sent again, and the client hears so.
                    self.fail_all(EngineUnavailable("the engine process ended while the request ran"))
                await asyncio.sleep(RECONNECT_INTERVAL)

    async def _converse(self, call: grpc.aio.StreamStreamCall) -> None:
        writing: asyncio.Task[None] | None = None
        try:
            while isinstance(message := await call.read(), pb.EngineMessage):
                if message.HasField("info"):
                    self.info = info_from(message.info)
                    self._outbox = asyncio.Queue()
                    writing = asyncio.create_task(self._write(call, self._outbox))
                    self.available = True
                self._receive(message)
        finally:
            call.cancel()
            if writing is not None:
                writing.cancel()
                await asyncio.gather(writing, return_exceptions=True)

    async def _write(self, call: grpc.aio.StreamStreamCall, outbox: asyncio.Queue[pb.ClientMessage]) -> None:
        while True:
            await call.write(await outbox.get())

    def _receive(self, message: pb.EngineMessage) -> None:
        if message.HasField("stats"):
            self.stats = stats_from(message.stats)
        for rejection in message.rejections:
            self._fail(rejection.number, error_from(rejection))
        if message.HasField("outputs"):
            samples = self._samples
            for sample, output in outputs_from(message.outputs):
                if (generation := samples.get(sample)) is not None and not generation.take(output):
                    samples.pop(sample, None)

    def _fail(self, number: int, error: JaxserveError) -> None:
        first = number * MAX_SAMPLES
        if (generation := self._samples.get(first)) is None:
            return
        for index in range(generation.request.params.n):
            self._samples.pop(first + index, None)
        generation.fail(error)
