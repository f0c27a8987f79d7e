"""Addresses of hosts, and the network interface that leads to them."""

import asyncio
import ipaddress
import os
import socket

import psutil

from jaxserve.errors import StartupError
from jaxserve.hosts.discovery import split_address
from jaxserve.hosts.wire import JOIN_TIME

RESOLVE_INTERVAL = 0.5  # seconds


def join_address(address: str, port: int) -> str:
    """ "ADDRESS:PORT" of an IP address."""
    return f"[{address}]:{port}" if ipaddress.ip_address(address).version == 6 else f"{address}:{port}"


async def resolve(coordinator: str) -> tuple[str, int]:
    """The IP address and the port of "HOST:PORT"; a name that nobody knows yet, as of a pod that is being started, is waited for.

    Raises:
        StartupError: nobody knows it in time, it is no name, or stands for all addresses of a host.
    """
    host, port = split_address(coordinator)
    loop = asyncio.get_running_loop()
    deadline = loop.time() + JOIN_TIME
    while True:
        try:
            found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            break
        except UnicodeError:
            raise StartupError(f"--coordinator {coordinator}: this is no host's name") from None
        except OSError as error:
            if loop.time() > deadline:
                raise StartupError(f"--coordinator {coordinator}: {error.strerror}") from None
        await asyncio.sleep(RESOLVE_INTERVAL)
    address = str(found[0][4][0])
    if ipaddress.ip_address(address).is_unspecified:  # "0" stands for it too
        raise StartupError(f"--coordinator must be an address that the other hosts can reach. Given: {coordinator}")
    return address, port


def use_interface_to(address: str, port: int) -> None:
    """Have NCCL and JAX's coordinator use the network by which this host reaches an address, and no proxy; by variables of this process.

    NCCL_SOCKET_IFNAME is left as it is where it is set.
    """
    if (interface := _interface_to(address, port)) is not None:
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
    name = "no_grpc_proxy"  # as gRPC has it, in small letters
    unproxied = os.environ.get(name) or os.environ.get("no_proxy") or ""
    os.environ[name] = ",".join(filter(None, [unproxied, address]))


def own_address(address: str, port: int) -> str:
    """The IP address at which this host is on the network by which it reaches another.

    Raises:
        StartupError: it does not reach it.
    """
    family = socket.AF_INET6 if ipaddress.ip_address(address).version == 6 else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, port))  # sends nothing
        except OSError as error:
            raise StartupError(f"host 0 cannot be reached at {join_address(address, port)}: {error.strerror}") from None
        return str(probe.getsockname()[0])


def free_pair(address: str) -> int:
    """A port of this host that nobody has, nor the next."""
    family = socket.AF_INET6 if ipaddress.ip_address(address).version == 6 else socket.AF_INET
    while True:
        with socket.socket(family) as first, socket.socket(family) as second:
            first.bind((address, 0))
            port = int(first.getsockname()[1])
            try:
                second.bind((address, port + 1))
            except (OSError, OverflowError):
                continue
            return port


def _interface_to(address: str, port: int) -> str | None:
    """The name of the interface by which this host reaches an address; None where there is no telling.

    NCCL takes names by their beginning, and whole after "=".
    """
    try:
        own = own_address(address, port)
    except StartupError:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == own for each in addresses):
            return f"={name}"
    return None
