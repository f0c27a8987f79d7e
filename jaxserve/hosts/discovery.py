"""Which hosts serve together: by flags, else as Kubernetes' LeaderWorkerSet or Slurm say in the environment."""

import ipaddress
from collections.abc import Mapping

from jaxserve.config import EngineOptions, HostOptions
from jaxserve.errors import StartupError
from jaxserve.hosts.placement import place
from jaxserve.hosts.secret import MIN_SECRET_LENGTH

DEFAULT_PORT = 29400
SLURM_PORTS = 61440, 2000  # the first, and how many pairs: above the ports that Linux gives to connections


def discover(options: HostOptions, engine: EngineOptions, environment: Mapping[str, str]) -> HostOptions:
    """Fill in what was not given, and hold it against the mesh.

    Args:
        options: as given.
        engine: the mesh must be one that the hosts can share evenly.
        environment: of this process.

    Returns:
        num_hosts 1 and nothing else, or all fields.

    Raises:
        StartupError: naming the flag.
    """
    if options.num_hosts == 1:
        return HostOptions(num_hosts=1)
    found, by = options, "--num-hosts"
    for who, look in (("LeaderWorkerSet", _leader_worker_set), ("Slurm", _slurm)):
        if options.num_hosts is None and (seen := look(environment)) is not None:
            found, by = _beside(options, seen), who
            break
    if found.num_hosts is None:
        if found.coordinator is not None or found.host_index is not None:
            raise StartupError("--coordinator and --host-index need --num-hosts")
        return HostOptions(num_hosts=1)
    if found.coordinator is None or found.host_index is None:
        raise StartupError(f"--num-hosts {found.num_hosts} needs --coordinator and --host-index")
    if found.host_index >= found.num_hosts:
        raise StartupError(f"--host-index must be less than --num-hosts ({found.num_hosts}). Given: {found.host_index}")
    host, _ = split_address(found.coordinator)
    _check_secret(found.cluster_secret, host, by)
    place(engine, found)
    return found


def split_address(coordinator: str) -> tuple[str, int]:
    """The host and the port of "HOST:PORT".

    Raises:
        StartupError: it is something else.
    """
    host, _, port = coordinator.rpartition(":")
    if not host or not (port.isascii() and port.isdigit()) or not 0 < int(port) < 65535:
        raise StartupError(f"--coordinator must be HOST:PORT, with a port from 1 to 65534. Given: {coordinator}")
    host = host.removeprefix("[").removesuffix("]")
    if host in ("0.0.0.0", "::", "*"):
        raise StartupError(f"--coordinator must be an address that the other hosts can reach. Given: {coordinator}")
    return host, int(port)


def _beside(given: HostOptions, seen: HostOptions) -> HostOptions:
    """What was seen, where nothing was given."""
    return HostOptions(
        given.coordinator or seen.coordinator,
        seen.num_hosts,
        seen.host_index if given.host_index is None else given.host_index,
        given.cluster_secret,
    )


def _leader_worker_set(environment: Mapping[str, str]) -> HostOptions | None:
    size, index = _number(environment, "LWS_GROUP_SIZE"), _number(environment, "LWS_WORKER_INDEX")
    leader = environment.get("LWS_LEADER_ADDRESS")
    if size is None or size < 2 or index is None or not leader:
        return None
    return HostOptions(f"{leader}:{DEFAULT_PORT}", size, index)


def _slurm(environment: Mapping[str, str]) -> HostOptions | None:
    """Of a step with one task a node; the port is the job's own, so that jobs can share a node."""
    nodes, tasks = _number(environment, "SLURM_STEP_NUM_NODES"), _number(environment, "SLURM_STEP_NUM_TASKS")
    index, job = _number(environment, "SLURM_PROCID"), _number(environment, "SLURM_JOB_ID")
    names = environment.get("SLURM_STEP_NODELIST")
    if nodes is None or nodes < 2 or index is None or job is None or not names:
        return None
    if tasks != nodes:
        raise StartupError(f"this Slurm step has {tasks} tasks on {nodes} nodes: start one on each (srun --ntasks-per-node=1)")
    first, pairs = SLURM_PORTS
    return HostOptions(f"{_first_node(names)}:{first + 2 * (job % pairs)}", nodes, index)


def _first_node(names: str) -> str:
    """ "gpu[004-007,12],login" -> "gpu004"."""
    prefix, bracket, rest = names.partition("[")
    if "," in prefix or not bracket:
        return names.split(",")[0]
    ranges, _, suffix = rest.partition("]")
    return prefix + ranges.split(",")[0].split("-")[0] + suffix.split(",")[0]


def _number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name, "")
    return int(text) if text.isascii() and text.isdigit() else None


def _check_secret(secret: str | None, host: str, found_by: str) -> None:
    if secret is not None:
        if len(secret) < MIN_SECRET_LENGTH:
            raise StartupError(f"--cluster-secret must have at least {MIN_SECRET_LENGTH} characters. Given: {len(secret)}")
    elif not _is_loopback(host):
        alone = "" if found_by == "--num-hosts" else f"; {found_by} says that there are other hosts, --num-hosts 1 serves without them"
        raise StartupError(f"hosts that are not one machine need --cluster-secret (or the variable CLUSTER_SECRET){alone}")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
