"""Errors to HTTP answers, in one place: OpenAI's shape under /v1/, TGI's everywhere else.

| error             | /v1/*                          | TGI's routes                      |
|-------------------|--------------------------------|-----------------------------------|
| body is not JSON  | 400 invalid_request_error      | 400 validation                    |
| not sent as JSON  | 415 invalid_request_error      | 415 validation                    |
| body too large    | 413 invalid_request_error      | 413 validation                    |
| bad or no field   | 400 invalid_request_error      | 422 validation                    |
| InvalidRequest    | 400 invalid_request_error      | 422 validation                    |
| ContextTooLong    | 400, context_length_exceeded   | 422 validation                    |
| ModelNotServed    | 404, model_not_found           | (their body names no model)       |
| wrong API key     | 401, invalid_api_key           | 401, no body                      |
| Overloaded        | 429 overloaded, Retry-After    | 429 overloaded, Retry-After       |
| GenerationFailed  | 500 server_error               | 424 generation                    |
| EngineUnavailable | 503 server_error, Retry-After  | 503 unavailable, Retry-After      |
| no such route     | 404 invalid_request_error      | 404 not_found                     |
| wrong method      | 405 invalid_request_error      | 405 method_not_allowed            |

Under /v1/messages the statuses are those of /v1/*, and the shape is Anthropic's.

With --tgi-strict all routes answer in TGI's shape, and a body that is not what a route takes is told in plain text, as TGI does it.
"""

import json
import logging
import re
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from jaxserve.errors import ContextTooLong, EngineUnavailable, GenerationFailed, InvalidRequest, JaxserveError, Overloaded
from jaxserve.http.request_record import note_error
from jaxserve.metrics import Metrics

logger = logging.getLogger(__name__)

_TYPE_NAMES = frozenset({"str", "int", "float", "bool", "constrained_str"})
_HTTP_KINDS = {404: "not_found", 405: "method_not_allowed"}


class ModelNotServed(InvalidRequest):
    """The request names a model that is not the one served here."""

    def __init__(self, name: str):
        super().__init__(f"The model `{name}` does not exist.", "model")


class NotFound(InvalidRequest):
    """The request names something that is not there."""


def openai_error(error: Exception) -> tuple[int, dict[str, Any]]:
    """Status and body in OpenAI's shape."""
    match error:
        case ModelNotServed():
            return 404, _openai(error, "invalid_request_error", "model_not_found", error.param)
        case NotFound():
            return 404, _openai(error, "invalid_request_error", "not_found", error.param)
        case ContextTooLong():
            return 400, _openai(error, "invalid_request_error", "context_length_exceeded", error.param)
        case InvalidRequest():
            return 400, _openai(error, "invalid_request_error", None, error.param)
        case Overloaded():
            return 429, _openai(error, "overloaded", "overloaded")
        case EngineUnavailable():
            return 503, _openai(error, "server_error", "engine_unavailable")
        case GenerationFailed():
            return 500, _openai(error, "server_error", "generation_failed")
        case HTTPException():
            return error.status_code, _openai(error.detail, "invalid_request_error", None)
    return 500, _openai("internal error", "server_error", "internal_error")


_ANTHROPIC_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def anthropic_error(error: Exception) -> tuple[int, dict[str, Any]]:
    """Status and body in Anthropic's shape."""
    status, told = openai_error(error)
    kind = _ANTHROPIC_KINDS.get(status, "api_error" if status >= 500 else "invalid_request_error")
    return status, {"type": "error", "error": {"type": kind, "message": told["error"]["message"]}}


def is_anthropic(path: str) -> bool:
    """Whether a path belongs to Anthropic's API."""
    return path == "/v1/messages" or path.startswith("/v1/messages/")


def tgi_error(error: Exception) -> tuple[int, dict[str, Any]]:
    """Status and body in TGI's shape."""
    match error:
        case InvalidRequest():
            reason = re.sub("^`grammar`: ", "grammar is not valid: ", str(error))  # what the engine found, in TGI's words
            return 422, _tgi(f"Input validation error: {reason}", "validation")
        case Overloaded():
            return 429, _tgi("Model is overloaded", "overloaded")
        case EngineUnavailable():
            return 503, _tgi(str(error), "unavailable")
        case GenerationFailed():
            return 424, _tgi(f"Request failed during generation: {error}", "generation")
        case HTTPException():
            return error.status_code, _tgi(str(error.detail), _HTTP_KINDS.get(error.status_code, "validation"))
    return 500, _tgi("internal error", "internal")


def _openai(message: object, kind: str, code: str | None, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": str(message), "type": kind, "param": param, "code": code}}


def _tgi(message: str, kind: str) -> dict[str, Any]:
    return {"error": message, "error_type": kind}


def error_body(path: str, error: Exception) -> tuple[int, dict[str, Any]]:
    """Status and body in the shape of the path's API."""
    if is_anthropic(path):
        return anthropic_error(error)
    return openai_error(error) if path.startswith("/v1/") else tgi_error(error)


def error_event(path: str, error: Exception) -> str:
    """A server-sent event that tells of an error after the stream began."""
    return f"data: {json.dumps(error_body(path, error)[1])}\n\n"


def answer_headers(error: Exception) -> dict[str, str]:
    """Retry-After where a retry makes sense; the end of the connection where the rest of a body is not wanted."""
    if isinstance(error, Overloaded | EngineUnavailable):
        return {"retry-after": str(error.retry_after)}
    if not isinstance(error, HTTPException):
        return {}
    return {**(error.headers or {}), **({"connection": "close"} if error.status_code == 413 else {})}


def failure_kind(error: Exception) -> str:
    """TGI's name for it in the metric tgi_request_failure."""
    match error:
        case Overloaded():
            return "overloaded"
        case InvalidRequest() | HTTPException():
            return "validation"
    return "generation"


def field_error(error: RequestValidationError) -> InvalidRequest | HTTPException:
    """The first thing that is wrong with a body, as one line that names the field."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return HTTPException(400, f"the body is not valid JSON: {first['ctx']['error']}")
    place = _place(first["loc"])
    if not place:
        return InvalidRequest("the body must be a JSON object")
    name = str(place[0]) + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place[1:])
    if isinstance(cause := first.get("ctx", {}).get("error"), ValueError):
        return InvalidRequest(f"`{name}` {cause}", name)
    messages = dict.fromkeys(each["msg"] for each in error.errors() if _place(each["loc"]) == place)
    return InvalidRequest(f"`{name}`: {', or: '.join(messages)}"[:400], name)


def _place(location: Sequence[int | str]) -> list[int | str]:
    """Names and numbers from the body down to a value; pydantic tells between them which of several types it tried."""
    place: list[int | str] = []
    for part in location[1:]:  # "body", "query" or "path"
        is_type = isinstance(part, str) and (not part.isidentifier() or not part.islower() or part in _TYPE_NAMES)
        if not is_type:
            place.append(part)
    return place


def _message(error: Exception) -> str:
    if isinstance(error, HTTPException):
        return str(error.detail)
    return str(error) if isinstance(error, JaxserveError) else "internal error"


def _plain_rejection(error: Exception, told: Exception, headers: dict[str, str]) -> Response:
    """What TGI says of a body before it looks at what the body asks for."""
    if isinstance(told, HTTPException):
        prefix = "Failed to parse the request body as JSON: " if isinstance(error, RequestValidationError) else ""
        return PlainTextResponse(f"{prefix}{told.detail}", told.status_code, headers)
    return PlainTextResponse(f"Failed to deserialize the JSON body into the target type: {told}", 422, headers)


def contain_errors(app: ASGIApp) -> ASGIApp:
    """Wrap an application whose error handlers have answered and logged every error.

    Starlette raises an unexpected error again after its answer, and uvicorn then closes the connection under the client's next request.
    """

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await app(scope, receive, send)
        except Exception as error:  # Starlette raises again what it has answered with a 500
            if scope["type"] != "http":
                raise
            logger.debug("answered already: %r", error)

    return call


def add_error_handlers(app: FastAPI, metrics: Metrics, strict: bool = False) -> None:
    """Answer every error of every route.

    Args:
        strict: as TGI does it.
    """

    async def answer(request: Request, error: Exception) -> Response:
        told = field_error(error) if isinstance(error, RequestValidationError) else error
        if not isinstance(told, JaxserveError | HTTPException):
            logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
        if request.method == "POST":
            metrics.tgi_failure.labels(failure_kind(told)).inc()
        path = request.url.path
        note_error(_message(told))
        headers = answer_headers(told)
        if strict and isinstance(error, RequestValidationError | HTTPException):
            return _plain_rejection(error, told, headers)
        status, body = tgi_error(told) if strict else error_body(path, told)
        return JSONResponse(body, status, headers=headers)

    for kind in (JaxserveError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, answer)
