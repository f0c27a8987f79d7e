"""What TGI's routes answer, for the description of the API (/openapi.json). The answers themselves are written by tgi_rendering."""

from typing import Any, Literal

from fastapi import Response

from jaxserve.http.body import Body

FinishReason = Literal["length", "eos_token", "stop_sequence"]


class PrefillToken(Body):
    """A token of the prompt; the first has no log probability."""

    id: int
    text: str
    logprob: float | None


class Token(PrefillToken):
    """A token of the answer."""

    special: bool


class SequenceDetails(Body):
    """How an answer came about."""

    finish_reason: FinishReason
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[Token]
    top_tokens: list[list[Token]] | None = None


class BestOfSequence(SequenceDetails):
    """A candidate that was not the best."""

    generated_text: str


class Details(SequenceDetails):
    """How the best candidate came about, and the others."""

    best_of_sequences: list[BestOfSequence] | None = None


class GenerateResponse(Body):
    """A whole answer."""

    generated_text: str
    details: Details | None = None


class StreamDetails(Body):
    """What the last event tells."""

    finish_reason: FinishReason
    generated_tokens: int
    seed: int | None
    input_length: int


class StreamResponse(Body):
    """An event."""

    index: int
    token: Token
    top_tokens: list[Token] | None = None
    generated_text: str | None
    details: StreamDetails | None


class SimpleToken(Body):
    """A token of a text, and the bytes that it covers."""

    id: int
    text: str
    start: int
    stop: int


class ChatTokenizeResponse(Body):
    """A conversation as the model sees it."""

    tokenize_response: list[SimpleToken]
    templated_text: str


class VertexResponse(Body):
    """The texts of all answers."""

    predictions: list[str]


class Events(Response):
    """Server-sent events, as the description names them."""

    media_type = "text/event-stream"


def whole(model: Any) -> dict[str, Any]:
    """Arguments of a route that answers with JSON."""
    return {"response_model": None, "responses": {200: {"model": model, "description": "The answer."}}}


def streamed() -> dict[str, Any]:
    """Arguments of a route that answers with events."""
    described = {200: {"model": StreamResponse, "description": "Events, one a token."}}
    return {"response_model": None, "response_class": Events, "responses": described}


def whole_or_streamed(model: Any) -> dict[str, Any]:
    """Arguments of a route that answers with JSON, or with events where the body asks for them."""
    events = {"text/event-stream": {"schema": {"$ref": f"#/components/schemas/{StreamResponse.__name__}"}}}
    described = {200: {"model": model, "description": "The answer; with `stream` events, one a token.", "content": events}}
    return {"response_model": None, "responses": described}
