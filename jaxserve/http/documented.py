"""What the description of the API (/openapi.json) says of errors."""

from typing import Any

from jaxserve.http.body import Body


class OpenAIError(Body):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIErrorBody(Body):
    """An error in OpenAI's shape."""

    error: OpenAIError


class AnthropicError(Body):
    """What is wrong."""

    type: str
    message: str


class AnthropicErrorBody(Body):
    """An error in Anthropic's shape."""

    type: str
    error: AnthropicError


class TGIErrorBody(Body):
    """An error in TGI's shape."""

    error: str
    error_type: str


_MEANINGS = {
    400: "The body is not JSON, a field is wrong, or the prompt is too long.",
    401: "The API key is wrong.",
    404: "The model or the object does not exist.",
    413: "The body is too large.",
    415: "The body is not sent as application/json.",
    422: "Not used: a wrong field is a 400.",
    429: "Too many requests; see Retry-After.",
    500: "The generation failed.",
    503: "No engine is ready; see Retry-After.",
}
OPENAI_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": meaning, "model": OpenAIErrorBody} for status, meaning in _MEANINGS.items()
}
ANTHROPIC_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": meaning, "model": AnthropicErrorBody} for status, meaning in _MEANINGS.items()
}
_TGI_MEANINGS = {**_MEANINGS, 422: "A field is wrong.", 424: "The generation failed."}
TGI_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": meaning, "model": TGIErrorBody} for status, meaning in _TGI_MEANINGS.items()
}
