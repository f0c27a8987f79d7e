"""JSON bodies, read strictly: the right content type, bounded nesting, no NaN, no infinity, and errors that name the field."""

from collections.abc import Callable, Coroutine
from json import JSONDecodeError
from typing import Annotated, Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, BeforeValidator, ConfigDict
from pydantic_core import from_json
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope


class Body(BaseModel):
    """Base of all bodies. Unknown fields are ignored; numbers are numbers, strings strings; null stands for an absent field."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, hide_input_in_errors=True)


def json_route(payload_limit: int) -> type[APIRoute]:
    """A class of routes whose body is JSON of at most `payload_limit` bytes.

    It is read by pydantic's own parser, which knows no NaN and gives up at 200 levels of nesting.
    """

    class JsonRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def handle_json(request: Request) -> Response:
                kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
                if request.method == "POST" and not _is_json(kind):
                    raise HTTPException(415, "Expected request with `Content-Type: application/json`")
                if (coding := request.headers.get("content-encoding", "identity").strip().lower()) != "identity":
                    raise HTTPException(415, f"bodies in the content coding `{coding[:32]}` are not supported")
                return await handle(_JsonRequest(request.scope, request.receive, payload_limit))

            return handle_json

    return JsonRoute


def _is_json(kind: str) -> bool:
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


class _JsonRequest(Request):
    def __init__(self, scope: Scope, receive: Receive, payload_limit: int):
        super().__init__(scope, receive)
        self._payload_limit = payload_limit
        self._data: bytes | None = None

    async def body(self) -> bytes:
        if self._data is not None:
            return self._data
        too_large = HTTPException(413, f"the body is larger than {self._payload_limit} bytes")
        length = self.headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._payload_limit:
            raise too_large
        data = bytearray()
        async for chunk in self.stream():
            data += chunk
            if len(data) > self._payload_limit:
                raise too_large
        self._data = bytes(data)
        return self._data

    async def json(self) -> Any:
        try:
            return from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise JSONDecodeError(str(error), "", 0) from error


def _refuse(value: Any) -> Any:
    if value not in (None, False, [], {}, "", "none"):
        raise ValueError("is not supported yet")
    return None


# A field that would change what is generated, and that nothing here implements: refused unless it says "no".
Unsupported = Annotated[Any, BeforeValidator(_refuse)]


def only(*allowed: Any) -> BeforeValidator:
    """Refuse all values but those that ask for nothing special."""

    def check(value: Any) -> None:
        if value is not None and value not in allowed:
            raise ValueError(f"other than {allowed[0]} is not supported yet")

    return BeforeValidator(check)
