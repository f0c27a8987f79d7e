"""Placement: which replicas, or which part of one, a host runs."""

from dataclasses import dataclass

from jaxserve.config import EngineOptions, HostOptions
from jaxserve.errors import StartupError


@dataclass(frozen=True, slots=True)
class Placement:
    """What a host runs of `--mesh DxT` over N hosts, whose replicas lie in the order of the hosts.

    Attributes:
        replicas: those that the host runs: D / N whole ones, or one that spans N / D hosts.
        span: hosts of a replica.
        index: of this host among those of its replica; host 0 of them runs the engine, the others workers.
    """

    replicas: range
    span: int
    index: int

    @property
    def runs_engines(self) -> bool:
        """Whether requests are sent here."""
        return self.index == 0


def place(engine: EngineOptions, hosts: HostOptions, host_index: int | None = None) -> Placement:
    """Where a host stands.

    Args:
        hosts: as discovered.
        host_index: another host than this one.

    Raises:
        StartupError: the hosts cannot share the mesh evenly.
    """
    count, data = hosts.num_hosts or 1, engine.data_size
    index = (hosts.host_index if host_index is None else host_index) or 0
    if data % count == 0:
        return Placement(range(index * data // count, (index + 1) * data // count), 1, 0)
    if count % data:
        raise StartupError(f"--mesh {engine.mesh}: {count} hosts cannot share {data} replicas evenly, nor {data} replicas {count} hosts")
    span = count // data
    if engine.tensor_size % span:
        raise StartupError(f"--mesh {engine.mesh}: {span} hosts cannot share {engine.tensor_size} devices evenly")
    return Placement(range(index // span, index // span + 1), span, index % span)
