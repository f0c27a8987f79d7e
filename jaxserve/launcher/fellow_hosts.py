"""FellowHosts: the other hosts of a server whose replicas are on several, as a launcher sees them."""

import asyncio
from pathlib import Path
from typing import Any

from jaxserve.config import EngineOptions, HostOptions, ModelOptions
from jaxserve.errors import StartupError
from jaxserve.hosts.addresses import free_pair, join_address, own_address, resolve
from jaxserve.hosts.agreement import flag_facts
from jaxserve.hosts.front import Front
from jaxserve.hosts.member import Member
from jaxserve.hosts.placement import place
from jaxserve.launcher.child import FILES_FACT
from jaxserve.launcher.run_folder import engine_address


class FellowHosts:
    """Tells the others of this host's engines; on host 0 hears of theirs, and keeps where they listen for the http processes.

    Args:
        folder: the run folder.
        model, engine: as all hosts must have been told.
        hosts: all of them, as discovered.

    Attributes:
        placed: set once engines can be started, with what follows.
        address: at which IP address they listen for host 0's http processes; "" on host 0.
        of_replica: the hosts that share one replica with this one.
    """

    def __init__(self, folder: Path, model: ModelOptions, engine: EngineOptions, hosts: HostOptions):
        self.placed = asyncio.Event()
        self.address = ""
        self.of_replica = HostOptions(num_hosts=1, cluster_secret=hosts.cluster_secret)
        self._folder = folder
        self._engine = engine
        self._hosts = hosts
        self._facts = flag_facts(model, engine)
        self._place = place(engine, hosts)
        self._end: Front | Member | None = None

    @property
    def serves(self) -> bool:
        """Whether this is host 0, and an engine of another host can be asked."""
        return isinstance(self._end, Front) and self._end.serves

    async def stay(self) -> str:
        """Be one of the hosts until that is over.

        Returns:
            why it is, in one line; "" where host 0 has finished its work.
        """
        hosts = self._hosts
        assert hosts.coordinator is not None and hosts.num_hosts is not None, "discovered before"
        try:
            address, port = await resolve(hosts.coordinator)
            if hosts.leads:
                self._end = front = Front(address, port, self._engine, hosts, self._facts, self._keep)
                await front.open()
                self._lead(address)
                await front.failed.wait()
                return front.failure
            member = Member(address, port, hosts.host_index or 0, hosts.num_hosts, hosts.cluster_secret, self._facts)
            self._end = member
            staying = asyncio.create_task(member.stay())
            self.address = own_address(address, port)
            if self._place.runs_engines:
                self._lead(self.address)
            else:
                await asyncio.wait([staying, member.coordinator], return_when=asyncio.FIRST_COMPLETED)
                if member.coordinator.done():
                    self._settle(member.coordinator.result())
            return await staying
        except StartupError as error:
            return str(error)

    async def join(self) -> None:
        """Wait until engines can be started, and host 0 knows of this host."""
        await self.placed.wait()
        if isinstance(self._end, Member):
            await self._end.welcomed.wait()

    def heard(self, replica: int, news: dict[str, Any]) -> None:
        """What an engine of this host tells its launcher."""
        if self._end is None:
            return
        if news["event"] == "found":
            self._end.tell_facts({FILES_FACT: news["files"]})
        elif news["event"] == "ready" and self._place.runs_engines:
            if isinstance(self._end, Front):
                self._end.tell_ready(replica)
            else:
                self._end.tell_engine(replica, news["address"])

    def ended(self, replica: int) -> None:
        """An engine of this host is no more."""
        if isinstance(self._end, Member) and self._place.runs_engines:
            self._end.tell_engine(replica, "")

    async def close(self, reason: str = "") -> None:
        """Leave; host 0 sends all others home.

        Args:
            reason: why, where something failed; one line.
        """
        if self._end is not None:
            await self._end.close(reason)

    def _lead(self, address: str) -> None:
        """Choose where the workers of this host's replica come, where it has any."""
        if self._place.span == 1:
            return self.placed.set()
        coordinator = join_address(address, free_pair(address))
        if self._end is not None:
            self._end.tell_coordinator(coordinator)
        self._settle(coordinator)

    def _settle(self, coordinator: str) -> None:
        place, secret = self._place, self._hosts.cluster_secret
        self.of_replica = HostOptions(coordinator, place.span, place.index, secret)
        self.placed.set()

    def _keep(self, replica: int, address: str) -> None:
        kept = engine_address(self._folder, replica)
        if not address:
            return kept.unlink(missing_ok=True)
        whole = kept.with_suffix(".new")
        whole.write_text(address)
        whole.replace(kept)
