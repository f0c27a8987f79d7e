"""Requests that are answered by another route of the same application: with its body, its errors and its headers."""

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

_BODY_HEADERS = (b"content-length", b"content-type", b"transfer-encoding", b"content-encoding")


class Forwarded(Response):
    """What another route answers to the same body.

    Args:
        request: as it came, its body read already.
        path: of the other route.
    """

    def __init__(self, request: Request, path: str, body: bytes):
        super().__init__()
        self._app = request.app.router
        self._path = path
        self._body = body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(_moved(scope, self._path), _replay(self._body, receive), send)


@dataclass(frozen=True, slots=True)
class Answered:
    """What a route answered."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes

    def json(self) -> Any:
        """The body, parsed."""
        return json.loads(self.body)


async def ask(request: Request, path: str, body: Any) -> Answered:
    """Let another route answer a body of our own; a client that hangs up is noticed there.

    Args:
        request: whose client, headers and connection it has.
        body: to be sent as JSON.
    """
    data = json.dumps(body).encode()
    headers = [pair for pair in request.scope["headers"] if pair[0] not in _BODY_HEADERS]
    headers += [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {**_moved(request.scope, path), "headers": headers, "extensions": {}}
    await request.app.router(scope, _replay(data, request.receive), send)
    status, told = next((m["status"], m["headers"]) for m in sent if m["type"] == "http.response.start")
    return Answered(status, list(told), b"".join(m.get("body", b"") for m in sent if m["type"] == "http.response.body"))


def _moved(scope: Scope, path: str) -> dict[str, Any]:
    # What the first route left in the scope would be taken for the second one's.
    kept = {name: value for name, value in scope.items() if name not in ("fastapi", "route", "endpoint", "path_params")}
    return {**kept, "path": path, "raw_path": path.encode(), "root_path": ""}


def _replay(body: bytes, receive: Receive) -> Callable[[], Awaitable[Message]]:
    told = False

    async def next_message() -> Message:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return next_message
