"""What a runner needs of the hosts that its mesh spans, and the start of JAX on them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import jax
import numpy as np

from jaxserve.errors import StartupError

HEARTBEAT_TIMEOUT = 10  # seconds until JAX ends all processes where one is silent; hosts notice a loss earlier, by themselves
JOIN_TIMEOUT = 300  # seconds
FAREWELL_TIMEOUT = 5  # seconds


class Hosts(Protocol):
    """The hosts of one mesh, as each of them sees them (hosts.Leader and hosts.Worker are some).

    All methods raise HostsFailed where a host is lost.
    """

    @property
    def index(self) -> int:
        """This one's; 0 leads."""
        ...

    @property
    def count(self) -> int:
        """All of them."""
        ...

    @property
    def jax_coordinator(self) -> str:
        """ADDRESS:PORT of host 0 for JAX's coordinator."""
        ...

    def gather(self, topic: str, text: str) -> list[str]:
        """What each host has to tell on a topic, by its index, once all have told it."""
        ...

    def share_files(self, topic: str, folder: Path) -> None:
        """Wait until a folder of this host holds all the files that the leader's holds; files are the same where their names are."""
        ...

    def tell(self, program: str, arrays: Sequence[np.ndarray]) -> None:
        """Have all others replay a call (the leader alone)."""
        ...

    def why_failed(self) -> str | None:
        """Why the hosts cannot go on together, where that is so or turns out to be soon; called where a step raised."""
        ...


def start_jax(hosts: Hosts) -> None:
    """Have JAX know the devices of all hosts; to be called before it has touched a device. Its coordinator listens at its address alone.

    Raises:
        StartupError: one line.
    """
    coordinator = hosts.jax_coordinator
    jax.config.update("jax_check_proxy_envs", False)  # hosts.addresses sees to it
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM for itself
    try:
        jax.distributed.initialize(
            coordinator,
            hosts.count,
            hosts.index,
            cluster_detection_method="deactivate",
            initialization_timeout=JOIN_TIMEOUT,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
            shutdown_timeout_seconds=FAREWELL_TIMEOUT,
            coordinator_bind_address=coordinator,
        )
    except (RuntimeError, ValueError) as error:
        raise StartupError(f"JAX's coordinator at {coordinator}: {str(error).splitlines()[0]}") from None


def smallest(hosts: Hosts | None, topic: str, value: int) -> int:
    """The smallest of all hosts' values."""
    return value if hosts is None else min(map(int, hosts.gather(topic, str(value))))
