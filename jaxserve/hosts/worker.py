"""Worker: any other host's end of the stream to the leader."""

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from queue import SimpleQueue

import numpy as np

from jaxserve.errors import HostsFailed
from jaxserve.hosts import worker_pb2 as pb
from jaxserve.hosts.group import Group
from jaxserve.hosts.membership import Membership
from jaxserve.hosts.wire import call_from

logger = logging.getLogger(__name__)


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
        self._membership = Membership(address, port, index, count, secret)
        self._files: dict[str, SimpleQueue[pb.File | None]] = {}

    async def join(self) -> None:
        """Wait for the leader and be welcomed.

        Raises:
            StartupError: it did not come in time, has another secret, or this host was started otherwise than the others.
        """
        await self._membership.join()

    async def listen(self) -> None:
        """Hear the leader until it is over; `failure` says why it is, `dismissed` whether that is right so."""
        reason = self._membership.lost
        try:
            while (message := await self._membership.read()) is not None:
                if message.WhichOneof("message") == "ended":
                    self.dismissed = not message.ended.reason and self.failure is None
                    reason = message.ended.reason or "host 0 is ending"
                    break
                self._hear(message)
        finally:
            self._fail(reason)
            self.calls.put(None)
            for files in self._files.values():
                files.put(None)
            await self._membership.hang_up()

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
        if self._fail(reason):
            await self._membership.say_last(reason)

    # The rest runs in the event loop.

    def _tell(self, topic: str, text: str) -> None:
        self._membership.tell(pb.WorkerMessage(told=pb.Told(topic=topic, text=text)))

    def _hear(self, message: pb.LeaderMessage) -> None:
        match message.WhichOneof("message"):
            case "call":
                self.calls.put(call_from(message.call))
            case "gathered":
                self._topic(message.gathered.topic).set_result(list(message.gathered.texts))
            case "file":
                self._files[message.file.topic].put(message.file)
