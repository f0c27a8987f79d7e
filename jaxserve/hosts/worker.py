"""Worker: any other host's end of the stream to the leader."""

import asyncio
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import grpc
import numpy as np

from jaxserve.errors import HostsFailed, StartupError
from jaxserve.hosts import worker_pb2 as pb
from jaxserve.hosts.addresses import join_address
from jaxserve.hosts.group import Group
from jaxserve.hosts.secret import is_proof, new_challenge, proof
from jaxserve.hosts.wire import CHANNEL_OPTIONS, JOIN_TIME, METHOD, call_from, own_version

logger = logging.getLogger(__name__)

RECONNECT_INTERVAL = 500  # milliseconds, while the leader is not there yet
FAREWELL_TIME = 2.0  # seconds


class Worker(Group):
    """Joins the leader, tells and hears what hosts gather, and takes calls. To be made in the event loop that it shall live in.

    Methods that are said to wait are for other threads.

    Args:
        address, port: an IP address of the leader and where it listens.
        index, count: which host this is, of how many.
        secret: of the cluster; None on loopback alone.

    Attributes:
        calls: what the leader tells to run, as (program, arrays); None once nothing more will come.
        dismissed: whether the leader said that it is over, and nothing failed.
    """

    def __init__(self, address: str, port: int, index: int, count: int, secret: str | None):
        super().__init__(index, count, address, port)
        self.calls: SimpleQueue[tuple[str, list[np.ndarray]] | None] = SimpleQueue()
        self.dismissed = False
        self._coordinator = join_address(address, port)
        self._secret = secret
        self._version = own_version()
        self._files: dict[str, SimpleQueue[pb.File | None]] = {}
        self._pending: asyncio.Queue[pb.WorkerMessage] = asyncio.Queue()
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

    async def join(self) -> None:
        """Wait for the leader and be welcomed.

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

    async def listen(self) -> None:
        """Hear the leader until it is over; `failure` says why it is, `dismissed` whether that is right so."""
        writing = asyncio.ensure_future(self._write())
        reason = f"host 0 was lost ({self._coordinator})"
        try:
            while isinstance(message := await self._stream.read(), pb.LeaderMessage):  # else it is gRPC's EOF
                if message.WhichOneof("message") == "ended":
                    self.dismissed = not message.ended.reason and self.failure is None
                    reason = message.ended.reason or "host 0 is ending"
                    break
                self._hear(message)
        except grpc.aio.BaseError:
            pass
        finally:
            writing.cancel()
            self._stream.cancel()
            self._fail(reason)
            self.calls.put(None)
            for files in self._files.values():
                files.put(None)

    def tell(self, program: str, arrays: Sequence[np.ndarray]) -> None:
        """The leader alone tells what to run."""
        raise NotImplementedError

    def share_files(self, topic: str, folder: Path) -> None:
        """Wait until a folder holds all files that the leader's holds.

        Raises:
            HostsFailed: the leader is lost or cannot go on.
        """
        folder.mkdir(parents=True, exist_ok=True)
        mine = {path.name for path in folder.iterdir()}
        arriving = self._in_loop(lambda: self._files.setdefault(topic, SimpleQueue()))
        leaders, *_ = self.gather(topic, json.dumps(sorted(mine)))
        missing = set(json.loads(leaders)) - mine
        count = len(missing)
        while missing:
            if (file := arriving.get()) is None:
                raise HostsFailed(self.failure)
            if file.name not in missing or Path(file.name).name != file.name or file.name.startswith("."):
                raise HostsFailed(f"host 0 sent a file that was not asked for: {file.name!r}")
            unfinished = folder / f".{file.name}.{os.getpid()}"
            unfinished.write_bytes(file.content)
            unfinished.replace(folder / file.name)
            missing.discard(file.name)
        logger.info("%d files of compiled programs were taken from host 0, %d were here", count, len(mine))

    async def fail(self, reason: str) -> None:
        """Tell the leader that this host cannot go on, and hang up.

        Args:
            reason: one line.
        """
        if self._stream is not None and self._fail(reason):
            try:
                async with asyncio.timeout(FAREWELL_TIME):
                    await self._stream.write(pb.WorkerMessage(failed=pb.Ended(reason=reason)))
                    await self._stream.done_writing()
            except (TimeoutError, grpc.aio.BaseError, asyncio.InvalidStateError):
                pass

    # The rest runs in the event loop.

    async def _handshake(self) -> None:
        challenge = new_challenge()
        hello = pb.Hello(host_index=self.index, num_hosts=self.count, version=self._version, challenge=challenge)
        await self._stream.write(pb.WorkerMessage(hello=hello))
        answer = (await self._read_one()).answer
        if not is_proof(answer.digest, proof(self._secret, 0, self.index, challenge, answer.challenge)):
            raise self._other_secret()
        digest = proof(self._secret, self.index, self.index, challenge, answer.challenge)
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

    def _tell(self, topic: str, text: str) -> None:
        self._pending.put_nowait(pb.WorkerMessage(told=pb.Told(topic=topic, text=text)))

    def _hear(self, message: pb.LeaderMessage) -> None:
        match message.WhichOneof("message"):
            case "call":
                self.calls.put(call_from(message.call))
            case "gathered":
                self._topic(message.gathered.topic).set_result(list(message.gathered.texts))
            case "file":
                self._files[message.file.topic].put(message.file)

    async def _write(self) -> None:
        while True:
            await self._stream.write(await self._pending.get())


def _one_line(text: str | None) -> str:
    return " ".join((text or "it hung up").split())
