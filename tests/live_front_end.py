"""The real front end in a thread of this process: uvicorn, routes, gRPC; behind it an EngineDouble."""

import asyncio
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx
from engine_double import EngineDouble

from jaxserve.config import ServerOptions
from jaxserve.http.server import HttpServer
from jaxserve.http.service import Service
from jaxserve.launcher.listening import listen
from jaxserve.metrics import Metrics
from jaxserve.rpc.client import EngineClient
from jaxserve.rpc.router import Router
from jaxserve.rpc.server import EngineServer


class LiveFrontEnd:
    """Listens on a free loopback port between `start` and `stop`.

    Args:
        tokenizer: folder.
        server: options.
        engine: arguments of EngineDouble, or an engine.
    """

    def __init__(self, tokenizer: Path, server: dict[str, Any] | None = None, engine: Any = None):
        is_engine = engine is not None and not isinstance(engine, dict)
        self.engine: Any = engine if is_engine else EngineDouble(str(tokenizer), **{"vocab_size": 320, **(engine or {})})
        self._folder = tempfile.TemporaryDirectory()
        path = Path(self._folder.name) / "engine.sock"
        self._socket = listen("127.0.0.1", 0, 1)[0]
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = httpx.Client(base_url=self.url, timeout=20)
        self.router = Router([EngineClient(path)])
        self.service = Service(self.router, Metrics(self.router.clients, None), ServerOptions(**(server or {})), None, 1024)
        self.http = HttpServer(self.service)
        self._engine_server_path = path
        self._thread = threading.Thread(target=self._run, name="front-end")

    def start(self) -> None:
        """Begin to serve; returns when it is ready."""
        self._thread.start()
        deadline = time.monotonic() + 60
        while not self.service.ready:
            assert time.monotonic() < deadline and self._thread.is_alive(), "the front end does not get ready"
            time.sleep(0.02)

    def stop(self) -> None:
        """End everything."""
        self.client.close()
        self.http.should_exit = True
        self._thread.join()
        self._socket.close()
        self._folder.cleanup()

    def idle(self, timeout: float = 5.0) -> bool:
        """Wait until the engine holds no request."""
        return self.engine.drain(timeout)

    def _run(self) -> None:
        async def serve() -> None:
            server = EngineServer(self.engine, self._engine_server_path)
            await server.start()
            await self.http.serve(sockets=[self._socket])
            await server.stop(0)

        asyncio.run(serve(), loop_factory=self.http.config.get_loop_factory())
        self.engine.close()
