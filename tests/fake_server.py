"""A server of OpenAI's streaming routes that says what a test tells it to, for clients: bench serve, chat, the chat page."""

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

from aiohttp import web

STATIC = Path(__file__).resolve().parent.parent / "jaxserve" / "http" / "static"
# What the real front end sends with the page (jaxserve.http): nothing from elsewhere, no inline code.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)


class FakeServer:
    """Listens on a free loopback port, in a thread of its own, between `start` and `stop`.

    Attributes:
        pieces: text of each token of an answer.
        delay: seconds before each token.
        status, error: where status is not 200, every POST is refused so.
        break_off: the stream ends without [DONE].
        bodies: of the requests so far.
        cancelled: requests whose client went away midway.
        running, most_running: requests at this moment, and at most.
    """

    def __init__(self) -> None:
        self.pieces = ["Hello", ",", " world", "!"]
        self.delay = 0.0
        self.status = 200
        self.error: Any = {"error": {"message": "no"}}
        self.break_off = False
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.cancelled = 0
        self.running = 0
        self.most_running = 0
        self.url = ""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    def start(self) -> None:
        """Listen."""
        self._thread.start()
        self.url = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()

    def stop(self) -> None:
        """Close every connection and end the thread."""
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _listen(self) -> str:
        app = web.Application()
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/info", self._info)
        app.router.add_post("/v1/completions", self._answer)
        app.router.add_post("/v1/chat/completions", self._answer)
        app.router.add_get("/chat", self._page)
        app.router.add_static("/chat/", STATIC)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "fake-model", "object": "model"}]})

    async def _info(self, request: web.Request) -> web.Response:
        return web.json_response({"model_id": "fake-model", "version": "0", "model_device_type": "cpu"})

    async def _page(self, request: web.Request) -> web.FileResponse:
        return web.FileResponse(STATIC / "chat.html", headers={"Content-Security-Policy": CONTENT_SECURITY_POLICY})

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        if self.status != 200:
            return web.json_response(self.error, status=self.status)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            return await self._stream(request, body)
        except (asyncio.CancelledError, ConnectionError):
            self.cancelled += 1
            raise
        finally:
            self.running -= 1

    async def _stream(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        chat = "messages" in body
        last = len(self.pieces) - 1
        for index, piece in enumerate(self.pieces):
            await asyncio.sleep(self.delay)
            choice: dict[str, Any] = {"index": 0, "finish_reason": "stop" if index == last else None}
            choice |= {"delta": {"content": piece}} if chat else {"text": piece}
            await self._send(response, {"choices": [choice]})
        if body.get("stream_options", {}).get("include_usage"):
            usage = {"prompt_tokens": 7, "completion_tokens": len(self.pieces), "total_tokens": 7 + len(self.pieces)}
            await self._send(response, {"choices": [], "usage": usage})
        if not self.break_off:
            await response.write(b": a comment\n\ndata: [DONE]\n\n")
        await response.write_eof()
        return response

    async def _send(self, response: web.StreamResponse, event: dict[str, Any]) -> None:
        await response.write(f"data: {json.dumps(event)}\n\n".encode())
