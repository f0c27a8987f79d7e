"""An HTTP process: the front end on one listening socket. `python -m jaxserve.launcher.http_process DESCRIPTOR LISTENING... `.

The second listening descriptor, where there is one, is for metrics alone.
"""

import importlib.metadata
import resource
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from jaxserve.hosts.placement import place
from jaxserve.http.protocol import MAX_CONNECTIONS
from jaxserve.http.server import HttpServer
from jaxserve.http.service import Service
from jaxserve.launcher.child import Control, run_child
from jaxserve.launcher.run_folder import engine_address, engine_socket, model_file
from jaxserve.metrics import Metrics
from jaxserve.request import EngineInfo
from jaxserve.rpc.client import EngineClient
from jaxserve.rpc.handshake import StreamKey
from jaxserve.rpc.router import Router

OTHER_FILES = 128  # that are no connections
# transformers imports them beside its tokenizers where they are installed. Nothing here uses them.
UNUSED = ("torch", "torchvision", "PIL", "tensorflow")


def main(arguments: Sequence[str]) -> int:
    """Run an HTTP process; returns the exit code."""
    keep_transformers_small()
    return run_child(arguments, lambda control: _run(control, [socket.socket(fileno=int(each)) for each in arguments[1:]]))


def keep_transformers_small() -> None:
    """Let transformers import its tokenizers and no more: with PyTorch it takes seconds longer.

    Before 5.23 it also asks, when it is imported, which of all installed files belong to which distribution. Without an answer it takes
    the names of packages for those of distributions.
    """
    modules = cast(dict[str, Any], sys.modules)
    for name in UNUSED:
        modules.setdefault(name, None)  # to Python a module that is not there
    importlib.metadata.packages_distributions = dict


def _run(control: Control, listening: Sequence[socket.socket]) -> None:
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))  # a connection is a file
    options = control.options
    folder = Path(options.run_folder)
    own, secret = place(options.engine, options.hosts).replicas, options.hosts.cluster_secret
    clients = [
        EngineClient(engine_socket(folder, replica), replica)
        if replica in own
        else EngineClient(engine_address(folder, replica), replica, StreamKey(secret, replica))
        for replica in range(options.engine.data_size)
    ]
    router = Router(clients, options.engine.prefix_caching)
    service = Service(
        router,
        Metrics(router.clients, options.server.served_model_name),
        options.server,
        options.model.tokenizer_config_path,
        options.engine.max_concurrent_requests,
        model_file(folder),
    )

    def tell_ready() -> None:
        control.tell_ready(model=service.model_name, device=service.info.device, dtype=_dtypes(service.info))

    unlimited = most_files == resource.RLIM_INFINITY
    most_connections = MAX_CONNECTIONS if unlimited else min(MAX_CONNECTIONS, max(most_files - OTHER_FILES, 1))
    server = HttpServer(service, tell_ready, [each.getsockname()[1] for each in listening[1:]], most_connections)
    server.run(sockets=list(listening))
    if server.failure is not None:
        raise server.failure


def _dtypes(info: EngineInfo) -> str:
    return f"{info.dtype}, weights {info.quantization}" if info.quantization else info.dtype


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
