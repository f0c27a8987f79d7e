"""Front: host 0 of hosts that share replicas, as its launcher sees the others. They may come and go."""

import asyncio
import json
import logging
from collections.abc import Callable, Mapping

from jaxserve.config import EngineOptions, HostOptions
from jaxserve.hosts import worker_pb2 as pb
from jaxserve.hosts.agreement import disagreement
from jaxserve.hosts.gate import Gate
from jaxserve.hosts.member import COORDINATOR
from jaxserve.hosts.placement import place

logger = logging.getLogger(__name__)


class Front:
    """Hears from the other hosts' launchers where their engines listen, and whether they were started alike.

    Until every replica has been there once, hosts that were started otherwise are the end of all; later they are turned away.

    Args:
        address, port: where it listens: an IP address of this host.
        engine, hosts: who has which replicas.
        facts: what all hosts must have been told alike.
        keep: is told a replica and where its engine listens, "" once it does no more.

    Attributes:
        failed: set where the hosts cannot serve together.
        failure: why, in one line.
    """

    def __init__(
        self,
        address: str,
        port: int,
        engine: EngineOptions,
        hosts: HostOptions,
        facts: Mapping[str, object],
        keep: Callable[[int, str], None],
    ):
        self.failed = asyncio.Event()
        self.failure = ""
        self._places = {index: place(engine, hosts, index) for index in range(hosts.num_hosts or 1)}
        self._missing = set(range(engine.data_size))  # replicas that have never been there
        self._reachable: set[int] = set()
        self._facts: dict[int, dict[str, object]] = {0: _as_told(facts)}
        self._leaving: dict[int, str] = {}  # hosts that have said why they leave
        self._coordinators: dict[int, str] = {}
        self._keep = keep
        self._gate = Gate(self, address, port, len(self._places), hosts.cluster_secret)

    @property
    def serves(self) -> bool:
        """Whether any engine of another host can be asked."""
        return bool(self._reachable)

    async def open(self) -> None:
        """Listen. Raises StartupError."""
        await self._gate.open()

    async def close(self, reason: str = "") -> None:
        """Tell the other hosts that it is over, and wait a moment until they have gone.

        Args:
            reason: why, where something failed; one line.
        """
        await self._gate.close(reason)

    def tell_facts(self, facts: Mapping[str, object]) -> None:
        """What turns out of this host's files."""
        self._facts[0].update(_as_told(facts))
        for index in sorted(self._facts.keys() - {0}):
            self._compare(index)

    def tell_ready(self, replica: int) -> None:
        """An engine of this host can be asked."""
        self._missing.discard(replica)

    def tell_coordinator(self, address: str) -> None:
        """Where the engine that this host leads waits for its workers."""
        self._tell_coordinator(0, address)

    # What the gate tells.

    def refused(self, reason: str) -> None:
        """One that could not join."""
        if self._missing:
            self._fail(reason)
        else:
            logger.error("turned away: %s", reason)

    def joined(self, index: int) -> None:
        """A host that waits for its coordinator is told of it."""
        stands = self._places[index]
        if not stands.runs_engines and (address := self._coordinators.get(stands.replicas[0])):
            self._gate.send(_gathered(address), index)

    def heard(self, index: int, message: pb.WorkerMessage) -> None:
        """What a host's launcher says."""
        match message.WhichOneof("message"):
            case "told" if message.told.topic == COORDINATOR:
                self._tell_coordinator(index, message.told.text)
            case "told" if (told := _facts_from(message.told.text)) is not None:
                self._facts.setdefault(index, {}).update(told)
                self._compare(index)
            case "engine" if message.engine.replica in self._places[index].replicas:
                self._take_engine(index, message.engine.replica, message.engine.address)
            case "failed":
                self._leaving[index] = message.failed.reason
            case _:
                self._disagree(index, f"host {index} says what no host of replicas does")

    def left(self, index: int, peer: str) -> None:
        """Its replicas are taken out until it comes back."""
        reason = self._leaving.pop(index, f"it was lost ({peer})")
        if reason:
            logger.error("host %d serves no more until it is started again: %s", index, reason)
        else:
            logger.info("host %d has left", index)
        self._facts.pop(index, None)
        stands = self._places[index]
        for replica in stands.replicas if stands.runs_engines else ():
            self._coordinators.pop(replica, None)
            self._take_engine(index, replica, "")

    def _take_engine(self, index: int, replica: int, address: str) -> None:
        if address:
            logger.info("engine %d of host %d is ready at %s", replica, index, address)
            self._missing.discard(replica)
            self._reachable.add(replica)
        else:
            self._reachable.discard(replica)
        self._keep(replica, address)

    def _tell_coordinator(self, index: int, address: str) -> None:
        """Tell the workers of the replica that a host leads."""
        replica = self._places[index].replicas[0]
        self._coordinators[replica] = address
        for other, stands in self._places.items():
            if replica in stands.replicas and not stands.runs_engines:
                self._gate.send(_gathered(address), other)

    def _compare(self, index: int) -> None:
        """Hold a host's facts against those that this one has too."""
        own, theirs = self._facts[0], self._facts[index]
        if difference := disagreement(own, theirs, index, [name for name in own if name in theirs]):
            self._disagree(index, difference)

    def _disagree(self, index: int, reason: str) -> None:
        if self._missing:
            self._fail(reason)
        else:
            logger.error("host %d is turned away: %s", index, reason)
            self._leaving[index] = ""  # and no more is to be said of it
            self._gate.turn_away(index, reason)

    def _fail(self, reason: str) -> None:
        self.failure = self.failure or reason
        self._gate.refusal = self.failure
        self.failed.set()


def _as_told(facts: Mapping[str, object]) -> dict[str, object]:
    return json.loads(json.dumps(facts))


def _facts_from(text: str) -> dict[str, object] | None:
    try:
        facts = json.loads(text)
    except ValueError:
        return None
    return facts if isinstance(facts, dict) else None


def _gathered(address: str) -> bytes:
    return pb.LeaderMessage(gathered=pb.Gathered(topic=COORDINATOR, texts=[address])).SerializeToString()
