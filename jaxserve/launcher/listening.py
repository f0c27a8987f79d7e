"""The listening sockets of the HTTP port, one an http process.

The launcher holds them all: connections that come while a process is being restarted wait instead of being refused.
"""

import socket

from jaxserve.errors import StartupError

BACKLOG = 2048
# Of each connection: the kernel would otherwise keep up to 4 MB for a client that does not read.
SEND_BUFFER = 131072


def num_http_processes(replicas: int, cores: int) -> int:
    """How many HTTP processes serve engine replicas where the user does not say: one for two, as far as there are cores beside the engines.

    One is enough for what two replicas yield where each token is an event and a write of its own; and not one each, because an engine has
    a message to send to each process in each step (docs/performance.md).
    """
    return max(1, min((replicas + 1) // 2, cores - replicas))


def listen(hostname: str, port: int, count: int) -> list[socket.socket]:
    """Open sockets that share a port; the kernel spreads connections over them.

    Args:
        port: 0 for any that is free.
        count: how many.

    Raises:
        StartupError: the port is in use, or the address is not one of this machine.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(hostname or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError as error:
        raise StartupError(f"cannot listen on {hostname}: {error.strerror}") from error
    try:
        # Without SO_REUSEPORT, so that another server's port is not shared by accident.
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
            address = probe.getsockname()
        return [_listen(family, address) for _ in range(count)]
    except OSError as error:
        raise StartupError(f"cannot listen on {hostname} port {port}: {error.strerror}") from error


def _listen(family: socket.AddressFamily, address: tuple[str, int]) -> socket.socket:
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    listening.bind(address)
    listening.listen(BACKLOG)
    return listening
