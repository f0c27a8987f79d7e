"""Ports for servers that a test starts."""

import itertools
import os
import socket
from contextlib import ExitStack

# Below the ports that Linux hands to outgoing connections (from 32768): one of those may be
# taken between the moment it is found free and the moment the server of the test listens.
_FIRST, _PAIRS = 20_000, 6_000
_PAIR = itertools.count(os.getpid() * 100)


def free_port() -> int:
    """A port of 127.0.0.1 that is free, as is the next; no other call gives either."""
    for pair in itertools.islice(_PAIR, _PAIRS):
        port = _FIRST + 2 * (pair % _PAIRS)
        with ExitStack() as probes:
            try:
                for each in (port, port + 1):
                    probes.enter_context(socket.create_server(("127.0.0.1", each)))
            except OSError:
                continue
            return port
    raise OSError(f"no two ports in a row are free from {_FIRST} on")
