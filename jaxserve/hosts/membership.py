"""Membership: any other host's end of its stream to host 0."""

import asyncio
import contextlib
from typing import Any

import grpc

from jaxserve.errors import StartupError
from jaxserve.hosts import worker_pb2 as pb
from jaxserve.hosts.addresses import join_address
from jaxserve.hosts.secret import is_proof, new_challenge, proof
from jaxserve.hosts.wire import CHANNEL_OPTIONS, JOIN_TIME, METHOD, own_version

RECONNECT_INTERVAL = 500  # milliseconds, while host 0 is not there yet
FAREWELL_TIME = 2.0  # seconds


class Membership:
    """Joins host 0 and stays. To be made in the event loop that it shall live in.

    Args:
        address, port: an IP address of host 0 and where it listens.
        index, count: which host this is, of how many.
        secret: of the cluster; None on loopback alone.

    Attributes:
        lost: what to say where host 0 is gone.
    """

    def __init__(self, address: str, port: int, index: int, count: int, secret: str | None):
        self._coordinator = join_address(address, port)
        self.lost = f"host 0 was lost ({self._coordinator})"
        self._index, self._count = index, count
        self._secret = secret
        self._version = own_version()
        self._pending: asyncio.Queue[pb.WorkerMessage | None] = asyncio.Queue()
        reconnect = ("initial", "min", "max")
        self._channel = grpc.aio.insecure_channel(
            self._coordinator,
            options=[
                *CHANNEL_OPTIONS,
                *((f"grpc.{which}_reconnect_backoff_ms", RECONNECT_INTERVAL) for which in reconnect),
                ("grpc.max_receive_message_length", -1),
            ],
        )
        self._stream: Any = None
        self._writing: asyncio.Task[None] | None = None

    async def join(self) -> None:
        """Wait for host 0 and be welcomed.

        Raises:
            StartupError: it did not come in time, has another secret, or this host was started otherwise than the others.
        """
        connect = self._channel.stream_stream(METHOD, pb.WorkerMessage.SerializeToString, pb.LeaderMessage.FromString)
        self._stream = connect(wait_for_ready=True)
        try:
            async with asyncio.timeout(JOIN_TIME):
                await self._handshake()
        except TimeoutError:
            raise StartupError(f"host 0 was not there, at {self._coordinator}, within {JOIN_TIME:.0f} s") from None
        except grpc.aio.AioRpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                raise self._other_secret() from None
            raise StartupError(f"host 0 ({self._coordinator}) does not answer as a leader: {_one_line(error.details())}") from None
        self._writing = asyncio.ensure_future(self._write())

    def tell(self, message: pb.WorkerMessage) -> None:
        """Tell host 0, as soon as this one has joined."""
        self._pending.put_nowait(message)

    async def read(self) -> pb.LeaderMessage | None:
        """What host 0 says next; None once it has hung up or is silent."""
        try:
            message = await self._stream.read()
        except (grpc.RpcError, grpc.aio.BaseError):
            return None
        return message if isinstance(message, pb.LeaderMessage) else None  # else it is gRPC's EOF

    async def hang_up(self) -> None:
        """Leave; nothing more is told."""
        if self._writing is not None:
            self._writing.cancel()
        if self._stream is not None:
            self._stream.cancel()
        await self._channel.close()

    async def say_last(self, reason: str) -> None:
        """Tell host 0 why this host cannot go on, in one line; "" where its work is done."""
        if self._writing is None or self._stream.done():
            return
        try:
            async with asyncio.timeout(FAREWELL_TIME):
                self.tell(pb.WorkerMessage(failed=pb.Ended(reason=reason)))
                self._pending.put_nowait(None)  # nothing comes after it
                await asyncio.wait([self._writing])
                await self._stream.code()  # it has been heard
        except (TimeoutError, grpc.aio.BaseError):
            pass

    async def _handshake(self) -> None:
        challenge = new_challenge()
        hello = pb.Hello(host_index=self._index, num_hosts=self._count, version=self._version, challenge=challenge)
        await self._stream.write(pb.WorkerMessage(hello=hello))
        answer = (await self._read_one()).answer
        if not is_proof(answer.digest, proof(self._secret, 0, self._index, challenge, answer.challenge)):
            raise self._other_secret()
        digest = proof(self._secret, self._index, self._index, challenge, answer.challenge)
        await self._stream.write(pb.WorkerMessage(proof=pb.Proof(digest=digest)))
        message = await self._read_one()
        if message.WhichOneof("message") == "ended":
            raise StartupError(message.ended.reason)

    async def _read_one(self) -> pb.LeaderMessage:
        if isinstance(message := await self._stream.read(), pb.LeaderMessage):
            return message
        raise StartupError(f"host 0 ({self._coordinator}) hung up")

    def _other_secret(self) -> StartupError:
        return StartupError(f"host 0 ({self._coordinator}) has another --cluster-secret")

    async def _write(self) -> None:
        with contextlib.suppress(grpc.RpcError, grpc.aio.BaseError, asyncio.InvalidStateError):  # the stream is over: read() tells
            while (message := await self._pending.get()) is not None:
                await self._stream.write(message)
            await self._stream.done_writing()


def _one_line(text: str | None) -> str:
    return " ".join((text or "it hung up").split())
