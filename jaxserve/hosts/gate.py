"""Gate: host 0's port, where the other hosts join and stay on a stream each."""

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any, Protocol

import grpc
from google.protobuf.message import DecodeError

from jaxserve.errors import StartupError
from jaxserve.hosts import worker_pb2 as pb
from jaxserve.hosts.addresses import join_address
from jaxserve.hosts.secret import is_proof, new_challenge, proof
from jaxserve.hosts.wire import CHANNEL_OPTIONS, METHOD, own_version, stop_server

logger = logging.getLogger(__name__)

HANDSHAKE_TIME = 10.0  # seconds
FAREWELL_TIME = 5.0  # seconds that hosts have to hear that it is over, and why
END_TIME = 0.5  # seconds that connections have to end by themselves
MAX_MESSAGE = 16 * 2**20  # bytes of what a host has to tell


class Keeper(Protocol):
    """Who is behind a gate (Leader and Front are), in the event loop."""

    def refused(self, reason: str) -> None:
        """A host that knows the secret was turned away; one line."""
        ...

    def joined(self, index: int) -> None:
        """A host is here."""
        ...

    def heard(self, index: int, message: pb.WorkerMessage) -> None:
        """What a host says."""
        ...

    def left(self, index: int, peer: str) -> None:
        """A host has hung up, or is silent."""
        ...


class Gate:
    """Lets in the hosts that prove to know the cluster's secret.

    Args:
        keeper: who hears of them.
        address, port: where it listens: an IP address of this host, on the cluster's network.
        count: of hosts, this one among them.
        secret: of the cluster; None on loopback alone.

    Attributes:
        refusal: why nobody is let in any more; one line.
    """

    def __init__(self, keeper: Keeper, address: str, port: int, count: int, secret: str | None):
        self.refusal = ""
        self._keeper = keeper
        self._listening = join_address(address, port)
        self._count = count
        self._secret = secret
        self._version = own_version()
        self._streams: dict[int, _Stream] = {}
        self._closing = False
        options = ("grpc.http2.max_ping_strikes", 0), ("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", MAX_MESSAGE)
        self._server = grpc.aio.server(options=[*CHANNEL_OPTIONS, *options])
        # Messages are made by whoever sends them: what goes to all is made once.
        handler = grpc.stream_stream_rpc_method_handler(self._join, pb.WorkerMessage.FromString, None)
        service, method = METHOD.strip("/").split("/")
        self._server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, {method: handler})])

    @property
    def missing(self) -> list[int]:
        """Hosts that are not here."""
        return sorted(set(range(1, self._count)) - self._streams.keys())

    async def open(self) -> None:
        """Listen.

        Raises:
            StartupError: the address is not this host's, or the port is taken.
        """
        try:
            self._server.add_insecure_port(self._listening)
        except RuntimeError:
            raise StartupError(
                f"cannot listen on {self._listening}: --coordinator must be an address of host 0, and its port free"
            ) from None
        await self._server.start()

    def send(self, message: bytes, index: int | None = None) -> None:
        """Send a LeaderMessage to one host, if it is here, or to all."""
        for stream in self._streams.values() if index is None else filter(None, [self._streams.get(index)]):
            stream.put(message)

    def turn_away(self, index: int | None, reason: str) -> None:
        """Tell one host, or all, that it is over for them; they hang up.

        Args:
            reason: why, where something failed; one line.
        """
        self.send(pb.LeaderMessage(ended=pb.Ended(reason=reason)).SerializeToString(), index)

    async def close(self, reason: str = "") -> None:
        """Tell all that it is over, and wait a moment until they have gone."""
        self._closing = True
        self.refusal = reason or "host 0 is ending"
        streams = list(self._streams.values())
        self.turn_away(None, reason)
        if streams:
            await asyncio.wait([asyncio.ensure_future(stream.ended.wait()) for stream in streams], timeout=FAREWELL_TIME)
        await stop_server(self._server, END_TIME)

    async def _join(self, messages: AsyncIterator[pb.WorkerMessage], context: Any) -> None:
        try:
            async with asyncio.timeout(HANDSHAKE_TIME):
                hello = await self._handshake(messages, context)
        except (TimeoutError, DecodeError, grpc.aio.BaseError):
            hello = None
        if hello is None:
            logger.warning("%s wanted to join as a host and did not show that it knows the cluster secret", context.peer())
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "another cluster secret")
            return
        if refusal := self._refusal(hello):
            await context.write(pb.LeaderMessage(ended=pb.Ended(reason=refusal)).SerializeToString())
            self._keeper.refused(refusal)
            return
        index = hello.host_index
        stream = self._streams[index] = _Stream()
        stream.put(pb.LeaderMessage(welcome=pb.Welcome()).SerializeToString())
        logger.info("host %d of %d has joined from %s", index, self._count, context.peer())
        self._keeper.joined(index)
        reading = asyncio.ensure_future(self._read(index, messages))
        try:
            await stream.write(context, reading)
        except grpc.aio.BaseError:
            pass
        finally:
            reading.cancel()
            del self._streams[index]
            stream.ended.set()
            if not self._closing:
                self._keeper.left(index, context.peer())

    async def _handshake(self, messages: AsyncIterator[pb.WorkerMessage], context: Any) -> pb.Hello | None:
        """Prove that this is host 0 and have the other prove that it belongs here; None where it cannot."""
        hello = (await anext(aiter(messages), pb.WorkerMessage())).hello
        challenge, index = new_challenge(), hello.host_index
        digest = proof(self._secret, 0, index, hello.challenge, challenge)
        await context.write(pb.LeaderMessage(answer=pb.Answer(challenge=challenge, digest=digest)).SerializeToString())
        message = await anext(aiter(messages), pb.WorkerMessage())
        # One proof for both ends would do for a worker that calls itself host 0.
        expected = proof(self._secret, index, index, hello.challenge, challenge)
        return hello if index and is_proof(message.proof.digest, expected) else None

    def _refusal(self, hello: pb.Hello) -> str:
        """Why a host cannot be one of these; "" where it can."""
        index = hello.host_index
        if hello.version != self._version:
            return f"the hosts disagree on jaxserve's version: {self._version} on host 0, {hello.version} on host {index}"
        if hello.num_hosts != self._count:
            return f"the hosts disagree on --num-hosts: {self._count} on host 0, {hello.num_hosts} on host {index}"
        if index >= self._count:
            return f"--host-index must be less than --num-hosts ({self._count}). Given: {index}"
        if index in self._streams:
            return f"there are two hosts with --host-index {index}"
        return self.refusal

    async def _read(self, index: int, messages: AsyncIterator[pb.WorkerMessage]) -> None:
        async for message in messages:
            self._keeper.heard(index, message)


class _Stream:
    """What waits to be sent to one host."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()
        self._pending: asyncio.Queue[bytes | None] = asyncio.Queue()

    def put(self, message: bytes) -> None:
        """Send a message after those that wait."""
        self._pending.put_nowait(message)

    async def write(self, context: Any, reading: "asyncio.Future[None]") -> None:
        """Send messages until the host hangs up."""
        reading.add_done_callback(lambda _: self._pending.put_nowait(None))
        while (message := await self._pending.get()) is not None:
            await context.write(message)
