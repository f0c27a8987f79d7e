"""HttpServer: the application under uvicorn, from the first connection to the last answer."""

import asyncio
import contextlib
import functools
import gc
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import uvicorn
from fastapi import FastAPI

from jaxserve.config import ServerOptions
from jaxserve.errors import EngineUnavailable, StartupError
from jaxserve.http.app import build_app
from jaxserve.http.errors import contain_errors
from jaxserve.http.protocol import LimitedProtocol
from jaxserve.http.service import Service
from jaxserve.http.sse import with_direct_send
from jaxserve.http.status_routes import metrics_alone

if TYPE_CHECKING:
    from jaxserve.http.tracing import Tracing

KEEP_ALIVE_TIMEOUT = 30  # seconds that an idle connection stays open
FAREWELL_TIME = 2  # seconds to tell clients that their requests could not be finished in time


class HttpServer(uvicorn.Server):
    """Serves from the start, with 503 until an engine is there and the tokenizer is loaded; ends on SIGTERM when all is answered.

    Args:
        service: what the routes work with.
        on_ready: called once, when requests can be answered.
        metrics_ports: where nothing but /metrics is answered.
        max_connections: beyond them clients hear 503; None: protocol.MAX_CONNECTIONS.

    Attributes:
        failure: why the server ended by itself, if it did.
    """

    def __init__(
        self,
        service: Service,
        on_ready: Callable[[], None] = lambda: None,
        metrics_ports: Sequence[int] = (),
        max_connections: int | None = None,
    ):
        self.failure: StartupError | None = None
        self._service = service
        self._on_ready = on_ready
        self._tracing = _tracing(service.options)
        self._tell = [] if self._tracing is None else [self._tracing.tell]
        protocol: Any = functools.partial(LimitedProtocol, payload_limit=service.options.payload_limit, max_connections=max_connections)
        super().__init__(
            uvicorn.Config(
                with_direct_send(contain_errors(metrics_alone(build_app(service, self._lifespan, self._tell), metrics_ports))),
                loop="uvloop",
                http=protocol,
                ws="none",
                proxy_headers=False,
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_TIMEOUT,
                timeout_graceful_shutdown=service.options.graceful_termination_timeout + FAREWELL_TIME,
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """End on SIGTERM, and then with exit code 0: uvicorn's own would die of the signal in the end."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self.handle_exit)
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no more, let what runs finish, and break off with an error what has not in time."""
        time_is_up = asyncio.get_running_loop().call_later(
            self._service.options.graceful_termination_timeout, self._service.router.fail_all, EngineUnavailable("the server is ending")
        )
        await super().shutdown(sockets)
        time_is_up.cancel()

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        self._service.router.start()
        loading = asyncio.create_task(self._become_ready())
        yield
        loading.cancel()
        self._service.close()
        await self._service.router.close()
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.close)

    async def _become_ready(self) -> None:
        try:
            await self._service.load_tokenizer()
        except StartupError as error:
            self.failure = error
            self.should_exit = True
        else:
            # What is loaded now stays: a full collection of it would hold up every stream. Before `open`, for it would hold up
            # the first request too (0.2 s).
            gc.collect()
            gc.freeze()
            await self._service.open()
            self._on_ready()


def _tracing(options: ServerOptions) -> "Tracing | None":
    if options.otlp_endpoint is None:
        return None
    from jaxserve.http.tracing import Tracing  # late: OpenTelemetry's packages are an extra

    return Tracing(options.otlp_endpoint, options.otlp_service_name)
