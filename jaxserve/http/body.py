"""JSON bodies, read strictly: the right content type, bounded nesting, no NaN, no infinity, and errors that name the field."""

from collections.abc import Callable, Coroutine
from json import JSONDecodeError
from typing import Annotated, Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, BeforeValidator, ConfigDict
from pydantic_core import from_json
from starlette.exceptions import HTTPException


class Body(BaseModel):
    """Base of all bodies. Unknown fields are ignored; numbers are numbers, strings strings; null stands for an absent field."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, hide_input_in_errors=True)


class JsonRoute(APIRoute):
    """A route whose body is read by pydantic's own parser: it knows no NaN and gives up at 200 levels of nesting."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if request.method == "POST" and not (
                kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))
            ):
                raise HTTPException(415, "Expected request with `Content-Type: application/json`")
            return await handle(_JsonRequest(request.scope, request.receive))

        return handle_json


class _JsonRequest(Request):
    async def json(self) -> Any:
        body = await self.body()
        try:
            return from_json(body, allow_inf_nan=False)
        except ValueError as error:
            raise JSONDecodeError(str(error), "", 0) from error


def _refuse(value: Any) -> Any:
    if value not in (None, False, [], {}, "", "none"):
        raise ValueError("not supported yet")
    return None


# A field that would change what is generated, and that nothing here implements: refused unless it says "no".
Unsupported = Annotated[Any, BeforeValidator(_refuse)]
