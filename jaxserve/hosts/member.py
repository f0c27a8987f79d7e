"""Member: any other of the hosts that share replicas, as its launcher sees host 0."""

import asyncio
import json
from collections.abc import Mapping

from jaxserve.errors import StartupError
from jaxserve.hosts import worker_pb2 as pb
from jaxserve.hosts.agreement import FLAGS
from jaxserve.hosts.membership import Membership

COORDINATOR = "coordinator"  # topic: where the host that leads a replica waits for the others of it


class Member:
    """Joins host 0 (Front) and tells it where this host's engines are, until one of them ends.

    Args:
        address, port: an IP address of host 0 and where it listens.
        index, count: which host this is, of how many.
        secret: of the cluster; None on loopback alone.
        facts: what all hosts must have been told alike.

    Attributes:
        welcomed: set once host 0 has let this one in.
        coordinator: where this host's replica waits for its workers, once host 0 tells.
    """

    def __init__(self, address: str, port: int, index: int, count: int, secret: str | None, facts: Mapping[str, object]):
        self.welcomed = asyncio.Event()
        self.coordinator: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._leaving = False
        self._membership = Membership(address, port, index, count, secret)
        self.tell_facts(facts)

    async def stay(self) -> str:
        """Join, and hear host 0 until it is over.

        Returns:
            why it is, in one line; "" where host 0 has finished its work, or this one has.
        """
        try:
            await self._membership.join()
            self.welcomed.set()
            while (message := await self._membership.read()) is not None:
                if message.WhichOneof("message") == "ended":
                    return message.ended.reason
                if message.WhichOneof("message") == "gathered" and message.gathered.topic == COORDINATOR:
                    (address,) = message.gathered.texts
                    if not self.coordinator.done():
                        self.coordinator.set_result(address)
                    elif self.coordinator.result() != address:
                        return "the first host of this one's replica has begun anew"
            return "" if self._leaving else self._membership.lost
        except StartupError as error:
            return str(error)
        finally:
            await self._membership.hang_up()

    def tell_facts(self, facts: Mapping[str, object]) -> None:
        """What this host was told, and what turns out of its files."""
        self._membership.tell(pb.WorkerMessage(told=pb.Told(topic=FLAGS, text=json.dumps(facts))))

    def tell_engine(self, replica: int, address: str) -> None:
        """Where an engine listens, "ADDRESS:PORT"; "" where it does no more."""
        self._membership.tell(pb.WorkerMessage(engine=pb.EngineAddress(replica=replica, address=address)))

    def tell_coordinator(self, address: str) -> None:
        """Where the engine that this host leads waits for its workers."""
        self._membership.tell(pb.WorkerMessage(told=pb.Told(topic=COORDINATOR, text=address)))

    async def close(self, reason: str = "") -> None:
        """Leave, and tell host 0 why, in one line; "" where this host's work is done. Then stay() ends."""
        self._leaving = True
        await self._membership.say_last(reason)
