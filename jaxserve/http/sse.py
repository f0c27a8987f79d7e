"""Server-sent events: a response that writes what an answer renders, as it comes."""

import asyncio
import json
from collections.abc import Callable, Mapping
from typing import Protocol

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from jaxserve.errors import JaxserveError

KEEP_ALIVE_INTERVAL = 15.0  # seconds of silence
DONE = "data: [DONE]\n\n"

# JSON without spaces; not ASCII only, because most scripts cost half as many bytes so.
compact = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
quoted: Callable[[str], str] = compact


_DIRECT_SEND = "jaxserve.send"


def with_direct_send(app: ASGIApp) -> ASGIApp:
    """Wrap an application so that its event streams send events past its middleware.

    Middleware looks at the start of a response only, but each layer of it costs every event a coroutine.
    """

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        scope.setdefault("extensions", {})[_DIRECT_SEND] = send
        await app(scope, receive, send)

    return call


class Events(Protocol):
    """What an EventStream writes."""

    async def read(self) -> bytes:
        """The next events, as many as there are; b"" at the end. Raises JaxserveError."""
        ...

    def failed(self, error: JaxserveError) -> bytes:
        """The last events of a stream that broke."""
        ...

    def abort(self) -> None:
        """Nobody listens any longer."""
        ...


class EventStream(Response):
    """Streams events until they end or the client hangs up.

    Status and headers wait for the first event, so that whatever goes wrong before it has a status of its own; after 15 s of silence
    they are sent with a comment. An error after that is told by an event.

    Args:
        events: what to write.
        headers: beside those that every stream has.
        errors_are_events: even before the first event, as in TGI.
    """

    def __init__(self, events: Events, headers: Mapping[str, str], errors_are_events: bool = False):
        super().__init__(None, 200, {"cache-control": "no-cache", "x-accel-buffering": "no", **headers}, "text/event-stream")
        del self.headers["content-length"]
        self._events = events
        self._errors_are_events = errors_are_events
        self._started = False
        self._writing = False
        self._written_at = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        loop = asyncio.get_running_loop()
        self._written_at = loop.time()
        self._send = send
        self._send_body = scope.get("extensions", {}).get(_DIRECT_SEND, send)
        tending = asyncio.create_task(self._tend(receive))
        try:
            while data := await self._events.read():
                await self._write(data)
                self._written_at = loop.time()
        except JaxserveError as error:
            if not self._started and not self._errors_are_events:
                raise
            await self._write(self._events.failed(error))
        finally:
            tending.cancel()
            self._events.abort()
        if self._started:
            await send({"type": "http.response.body", "body": b""})

    async def _write(self, data: bytes) -> None:
        self._writing = True
        if not self._started:
            self._started = True
            await self._send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await self._send_body({"type": "http.response.body", "body": data, "more_body": True})
        self._writing = False

    async def _tend(self, receive: Receive) -> None:
        """Notice that the client hangs up; break the silence."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                async with asyncio.timeout_at(max(self._written_at, loop.time() - KEEP_ALIVE_INTERVAL) + KEEP_ALIVE_INTERVAL):
                    if (await receive())["type"] == "http.disconnect":
                        self._events.abort()
                        return
            except TimeoutError:
                if not self._writing and loop.time() - self._written_at >= KEEP_ALIVE_INTERVAL:
                    self._written_at = loop.time()
                    await self._write(b":\n\n")
