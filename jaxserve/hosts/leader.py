"""Leader: host 0's end of the streams to the workers."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from jaxserve.errors import HostsFailed, StartupError
from jaxserve.hosts import worker_pb2 as pb
from jaxserve.hosts.addresses import join_address
from jaxserve.hosts.group import Group
from jaxserve.hosts.secret import is_proof, new_challenge, proof
from jaxserve.hosts.wire import CHANNEL_OPTIONS, JOIN_TIME, METHOD, call_message, own_version

logger = logging.getLogger(__name__)

HANDSHAKE_TIME = 10.0  # seconds
FAREWELL_TIME = 5.0  # seconds that workers have to hear that it is over, and why
MAX_MESSAGE = 16 * 2**20  # bytes of what a worker has to tell


class Leader(Group):
    """Waits for the workers, hears what they tell, and tells them what to run. To be made in the event loop that it shall live in.

    Methods that are said to wait are for other threads.

    Args:
        address, port: where it listens: an IP address of this host, on the cluster's network.
        count: of hosts, itself among them.
        secret: of the cluster; None on loopback alone.
    """

    def __init__(self, address: str, port: int, count: int, secret: str | None):
        super().__init__(0, count, address, port)
        self._listening = join_address(address, port)
        self._secret = secret
        self._version = own_version()
        self._streams: dict[int, _Stream] = {}
        self._told: dict[str, dict[int, str]] = {}
        self._ending = False
        self._all_here: Future[None] = Future()
        options = ("grpc.http2.max_ping_strikes", 0), ("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", MAX_MESSAGE)
        self._server = grpc.aio.server(options=[*CHANNEL_OPTIONS, *options])
        # Messages are made by whoever sends them: what goes to all is made once.
        handler = grpc.stream_stream_rpc_method_handler(self._join, pb.WorkerMessage.FromString, None)
        service, method = METHOD.strip("/").split("/")
        self._server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, {method: handler})])

    async def start(self) -> None:
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
        self._loop.call_later(JOIN_TIME, self._stop_waiting)

    def wait_for_all(self) -> None:
        """Wait until all workers have joined.

        Raises:
            HostsFailed: one did not come in time, or was started otherwise.
        """
        self._all_here.result()

    def tell(self, program: str, arrays: Sequence[np.ndarray]) -> None:
        """Have all workers run a program (any thread); returns at once."""
        self._loop.call_soon_threadsafe(self._send, call_message(program, arrays).SerializeToString())

    def share_files(self, topic: str, folder: Path) -> None:
        """Send each worker the files of a folder that its own lacks (waits until all have told what they have).

        Raises:
            HostsFailed: a host is lost or cannot go on.
        """
        folder.mkdir(parents=True, exist_ok=True)
        files = {path.name: path for path in sorted(folder.iterdir()) if path.is_file()}
        _, *others = self.gather(topic, json.dumps(list(files)))
        for index, theirs in enumerate(others, 1):
            for name in files.keys() - set(json.loads(theirs)):
                file = pb.File(topic=topic, name=name, content=files[name].read_bytes())
                self._loop.call_soon_threadsafe(self._send, pb.LeaderMessage(file=file).SerializeToString(), index)

    async def end(self, reason: str = "") -> None:
        """Tell the workers that it is over, and wait a moment until they have gone.

        Args:
            reason: why, where something failed; one line.
        """
        self._ending = True
        self._fail(reason or "host 0 is ending")
        streams = list(self._streams.values())
        for stream in streams:
            stream.put(pb.LeaderMessage(ended=pb.Ended(reason=reason)).SerializeToString())
        if streams:
            await asyncio.wait([asyncio.ensure_future(stream.ended.wait()) for stream in streams], timeout=FAREWELL_TIME)
        await self._server.stop(None)

    # The rest runs in the event loop.

    def _tell(self, topic: str, text: str) -> None:
        self._hear(0, topic, text)

    def _hear(self, index: int, topic: str, text: str) -> None:
        """Take what a host tells; once all have, tell them all."""
        told = self._told.setdefault(topic, {})
        told[index] = text
        if len(told) == self.count and self.failure is None:
            texts = [told[i] for i in range(self.count)]
            self._send(pb.LeaderMessage(gathered=pb.Gathered(topic=topic, texts=texts)).SerializeToString())
            self._topic(topic).set_result(texts)

    def _send(self, message: bytes, index: int | None = None) -> None:
        for stream in self._streams.values() if index is None else [self._streams[index]]:
            stream.put(message)

    def _fail(self, reason: str) -> bool:
        first = super()._fail(reason)
        if first and not self._all_here.done():
            self._all_here.set_exception(HostsFailed(reason))
        return first

    def _stop_waiting(self) -> None:
        if missing := sorted(set(range(1, self.count)) - self._streams.keys()):
            hosts = "host" if len(missing) == 1 else "hosts"
            self._fail(f"{hosts} {', '.join(map(str, missing))} did not join within {JOIN_TIME:.0f} s")

    async def _join(self, messages: AsyncIterator[pb.WorkerMessage], context: Any) -> None:
        try:
            async with asyncio.timeout(HANDSHAKE_TIME):
                hello = await self._handshake(messages, context)
        except TimeoutError:
            hello = None
        if hello is None:
            logger.warning("%s wanted to join as a host and did not show that it knows the cluster secret", context.peer())
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "another cluster secret")
            return
        if refusal := self._refusal(hello):
            await context.write(pb.LeaderMessage(ended=pb.Ended(reason=refusal)).SerializeToString())
            # A stranger to hosts that are together is turned away; before, it is one of those that were meant to come.
            if not self._all_here.done():
                self._fail(refusal)
            return
        index = hello.host_index
        stream = self._streams[index] = _Stream()
        stream.put(pb.LeaderMessage(welcome=pb.Welcome()).SerializeToString())
        logger.info("host %d of %d has joined from %s", index, self.count, context.peer())
        if len(self._streams) == self.count - 1 and not self._all_here.done():
            self._all_here.set_result(None)
        reading = asyncio.ensure_future(self._read(index, messages))
        try:
            await stream.write(context, reading)
        except grpc.aio.BaseError:
            pass
        finally:
            reading.cancel()
            stream.ended.set()
            if not self._ending:
                self._fail(f"host {index} was lost ({context.peer()})")

    async def _handshake(self, messages: AsyncIterator[pb.WorkerMessage], context: Any) -> pb.Hello | None:
        """Prove that this is the leader and have the worker prove that it belongs here; None where it cannot."""
        hello = (await anext(aiter(messages), pb.WorkerMessage())).hello
        challenge, index = new_challenge(), hello.host_index
        digest = proof(self._secret, 0, index, hello.challenge, challenge)
        await context.write(pb.LeaderMessage(answer=pb.Answer(challenge=challenge, digest=digest)).SerializeToString())
        message = await anext(aiter(messages), pb.WorkerMessage())
        # One proof for both ends would do for a worker that calls itself host 0.
        expected = proof(self._secret, index, index, hello.challenge, challenge)
        return hello if index and is_proof(message.proof.digest, expected) else None

    def _refusal(self, hello: pb.Hello) -> str:
        """Why a worker cannot be one of these hosts; "" where it can."""
        if hello.version != self._version:
            return f"the hosts disagree on jaxserve's version: {self._version} on host 0, {hello.version} on host {hello.host_index}"
        if hello.num_hosts != self.count:
            return f"the hosts disagree on --num-hosts: {self.count} on host 0, {hello.num_hosts} on host {hello.host_index}"
        if hello.host_index in self._streams:
            return f"there are two hosts with --host-index {hello.host_index}"
        return self.failure or ""

    async def _read(self, index: int, messages: AsyncIterator[pb.WorkerMessage]) -> None:
        async for message in messages:
            if message.WhichOneof("message") == "told":
                self._hear(index, message.told.topic, message.told.text)
            elif message.WhichOneof("message") == "failed":
                self._fail(f"host {index}: {message.failed.reason}")
                return


class _Stream:
    """What waits to be sent to one worker."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()
        self._pending: asyncio.Queue[bytes | None] = asyncio.Queue()

    def put(self, message: bytes) -> None:
        """Send a message after those that wait."""
        self._pending.put_nowait(message)

    async def write(self, context: Any, reading: "asyncio.Future[None]") -> None:
        """Send messages until the worker hangs up."""
        reading.add_done_callback(lambda _: self._pending.put_nowait(None))
        while (message := await self._pending.get()) is not None:
            await context.write(message)
