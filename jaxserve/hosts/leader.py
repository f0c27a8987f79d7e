"""Leader: host 0's end of the streams to the workers of its mesh."""

import json
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np

from jaxserve.errors import HostsFailed
from jaxserve.hosts import worker_pb2 as pb
from jaxserve.hosts.gate import Gate
from jaxserve.hosts.group import Group
from jaxserve.hosts.wire import JOIN_TIME, call_message


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
        self._gate = Gate(self, address, port, count, secret)
        self._told: dict[str, dict[int, str]] = {}
        self._all_here: Future[None] = Future()

    async def start(self) -> None:
        """Listen.

        Raises:
            StartupError: the address is not this host's, or the port is taken.
        """
        await self._gate.open()
        self._loop.call_later(JOIN_TIME, self._stop_waiting)

    def wait_for_all(self) -> None:
        """Wait until all workers have joined.

        Raises:
            HostsFailed: one did not come in time, or was started otherwise.
        """
        self._all_here.result()

    def tell(self, program: str, arrays: Sequence[np.ndarray]) -> None:
        """Have all workers run a program (any thread); returns at once."""
        self._loop.call_soon_threadsafe(self._gate.send, call_message(program, arrays).SerializeToString())

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
                self._loop.call_soon_threadsafe(self._gate.send, pb.LeaderMessage(file=file).SerializeToString(), index)

    async def end(self, reason: str = "") -> None:
        """Tell the workers that it is over, and wait a moment until they have gone.

        Args:
            reason: why, where something failed; one line.
        """
        self._fail(reason or "host 0 is ending")
        await self._gate.close(reason)

    # The rest runs in the event loop.

    def _tell(self, topic: str, text: str) -> None:
        self._hear(0, topic, text)

    def _hear(self, index: int, topic: str, text: str) -> None:
        """Take what a host tells; once all have, tell them all."""
        told = self._told.setdefault(topic, {})
        told[index] = text
        if len(told) == self.count and self.failure is None:
            texts = [told[i] for i in range(self.count)]
            self._gate.send(pb.LeaderMessage(gathered=pb.Gathered(topic=topic, texts=texts)).SerializeToString())
            self._topic(topic).set_result(texts)

    def _fail(self, reason: str) -> bool:
        first = super()._fail(reason)
        self._gate.refusal = self.failure or ""
        if first and not self._all_here.done():
            self._all_here.set_exception(HostsFailed(reason))
        return first

    def _stop_waiting(self) -> None:
        if missing := self._gate.missing:
            hosts = "host" if len(missing) == 1 else "hosts"
            self._fail(f"{hosts} {', '.join(map(str, missing))} did not join within {JOIN_TIME:.0f} s")

    # What the gate tells.

    def refused(self, reason: str) -> None:
        """A stranger to hosts that are together is turned away; before, it is one of those that were meant to come."""
        if not self._all_here.done():
            self._fail(reason)

    def joined(self, index: int) -> None:
        """A worker is here."""
        if not self._gate.missing and not self._all_here.done():
            self._all_here.set_result(None)

    def heard(self, index: int, message: pb.WorkerMessage) -> None:
        """What a worker says."""
        if message.WhichOneof("message") == "told":
            self._hear(index, message.told.topic, message.told.text)
        elif message.WhichOneof("message") == "failed":
            self._fail(f"host {index}: {message.failed.reason}")

    def left(self, index: int, peer: str) -> None:
        """No worker can be done without."""
        self._fail(f"host {index} was lost ({peer})")
