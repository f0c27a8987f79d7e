"""An HTTP process: the front end on one listening socket. `python -m jaxserve.launcher.http_process DESCRIPTOR LISTENING_DESCRIPTOR`.

It listens from the start and answers 503 until an engine is there and the tokenizer is loaded.
"""

import asyncio
import contextlib
import functools
import gc
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from jaxserve.errors import StartupError
from jaxserve.http.app import build_app
from jaxserve.http.protocol import LimitedProtocol
from jaxserve.http.service import Service
from jaxserve.http.sse import with_direct_send
from jaxserve.launcher.child import Control, run_child
from jaxserve.launcher.run_folder import engine_socket
from jaxserve.metrics import Metrics
from jaxserve.rpc.client import EngineClient
from jaxserve.rpc.router import Router

MAX_CONNECTIONS = 8192
KEEP_ALIVE_TIMEOUT = 30  # seconds that an idle connection stays open


def main(arguments: Sequence[str]) -> int:
    """Run an HTTP process; returns the exit code."""
    return run_child(arguments, lambda control: _run(control, socket.socket(fileno=int(arguments[1]))))


def _run(control: Control, listening: socket.socket) -> None:
    options, server_options = control.options, control.options.server
    folder = Path(options.run_folder)
    router = Router([EngineClient(engine_socket(folder, replica), replica) for replica in range(options.engine.data_size)])
    service = Service(
        router,
        Metrics(router.clients, server_options.served_model_name),
        server_options,
        options.model.tokenizer_config_path,
        options.engine.max_concurrent_requests,
    )
    failures: list[StartupError] = []

    async def become_ready() -> None:
        try:
            await service.load_tokenizer()
        except StartupError as error:
            failures.append(error)
            server.should_exit = True
        else:
            gc.collect()
            gc.freeze()  # what is loaded now stays; a full collection of it would hold up every stream for 50 ms
            info = service.info
            control.tell_ready(model=service.model_name, device=info.device, dtype=info.dtype)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        router.start()
        loading = asyncio.create_task(become_ready())
        yield
        loading.cancel()
        service.close()
        await router.close()

    protocol: Any = functools.partial(LimitedProtocol, payload_limit=server_options.payload_limit)
    server = _Server(
        uvicorn.Config(
            with_direct_send(build_app(service, lifespan)),
            loop="uvloop",
            http=protocol,
            ws="none",
            proxy_headers=False,
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            limit_concurrency=MAX_CONNECTIONS,
            timeout_keep_alive=KEEP_ALIVE_TIMEOUT,
            timeout_graceful_shutdown=server_options.graceful_termination_timeout,
        )
    )
    server.run(sockets=[listening])
    if failures:
        raise failures[0]


class _Server(uvicorn.Server):
    """Ends on SIGTERM with exit code 0; uvicorn's own would die of the signal in the end."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        signal.signal(signal.SIGTERM, self.handle_exit)
        yield


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
