"""Responses in OpenAI's words: the object, and the stream of events about it (see sse.Events)."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxserve.errors import JaxserveError
from jaxserve.http.answer import SampleToken
from jaxserve.http.errors import failure_kind, openai_error
from jaxserve.http.logprobs import chat_logprobs
from jaxserve.http.response_items import Event, ResponseItems
from jaxserve.http.responses_types import ResponsesBody
from jaxserve.http.service import Service
from jaxserve.http.sse import compact
from jaxserve.http.turn import Turn
from jaxserve.request import SamplingParams


def response_head(service: Service, body: ResponsesBody, params: SamplingParams, response_id: str) -> dict[str, Any]:
    """What a response says of itself before there is an answer."""
    text = body.text.model_dump(by_alias=True, exclude_none=True) if body.text is not None else {"format": {"type": "text"}}
    if text["format"]["type"] != "json_schema":
        text["format"].pop("schema", None)
    effort = body.reasoning.effort if body.reasoning is not None else None
    choice = body.tool_choice if isinstance(body.tool_choice, str | None) else body.tool_choice.model_dump()
    return {
        "id": response_id,
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": None,
        "metadata": body.metadata or {},
        "model": service.model_name,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "reasoning": {"effort": effort, "summary": None},
        "service_tier": "default",
        "store": body.keeps,
        "temperature": params.temperature,
        "text": text,
        "tool_choice": choice or "auto",
        "tools": [{"strict": None, "parameters": None, "description": None, **tool.model_dump()} for tool in body.tools or ()],
        "top_logprobs": params.logprobs or 0,
        "top_p": params.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": body.user if isinstance(body.user, str) else None,
    }


def response_end(head: Mapping[str, Any], turn: Turn, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The whole response."""
    reason = turn.finish_reason(turn.answers.samples[0])
    details = {"length": "max_output_tokens"}.get(reason or "")
    return {
        **head,
        "status": "incomplete" if details else "completed",
        "completed_at": int(time.time()),
        "incomplete_details": {"reason": details} if details else None,
        "output": list(items),
        "usage": response_usage(turn),
    }


def response_usage(turn: Turn) -> dict[str, Any]:
    """Tokens of a response."""
    (answer,) = turn.answers.answers
    num_input, num_output = len(answer.request.prompt_token_ids), turn.answers.num_output_tokens
    return {
        "input_tokens": num_input,
        "input_tokens_details": {"cached_tokens": answer.meter.num_cached_tokens},
        "output_tokens": num_output,
        "output_tokens_details": {"reasoning_tokens": turn.num_reasoning_tokens},
        "total_tokens": num_input + num_output,
    }


def token_logprobs(service: Service, token: SampleToken) -> list[dict[str, Any]]:
    """Log probabilities of a token, if asked for."""
    return chat_logprobs([token], service.tokenizer)["content"] if token.logprobs is not None else []


class ResponseEvents:
    """The events of a streamed response.

    Args:
        service: tokenizer and metrics.
        turn: to be read.
        head: of the response.
        keep: called with the whole response.
    """

    def __init__(self, service: Service, turn: Turn, head: Mapping[str, Any], keep: Callable[[Mapping[str, Any]], None]):
        self._service = service
        self._turn = turn
        self._head = head
        self._keep = keep
        self._items = ResponseItems()
        self._num_events = 0
        self._over = False

    async def read(self) -> bytes:
        while not self._over:
            tokens = await self._turn.read()
            events: list[Event] = []
            if not self._num_events:
                events += [{"type": f"response.{state}", "response": self._head} for state in ("created", "in_progress")]
            for token, delta in tokens:
                events += self._items.push(delta, token_logprobs(self._service, token))
            if not tokens:
                self._over = True
                events += self._last_events()
            if events:
                return self._rendered(events)
        return b""

    def failed(self, error: JaxserveError) -> bytes:
        self._service.metrics.tgi_failure.labels(failure_kind(error)).inc()
        told = openai_error(error)[1]["error"]
        failure = {"code": "server_error", "message": told["message"]}
        return self._rendered([{"type": "response.failed", "response": {**self._head, "status": "failed", "error": failure}}])

    def abort(self) -> None:
        self._turn.answers.abort()

    def _last_events(self) -> list[Event]:
        complete = self._turn.finish_reason(self._turn.answers.samples[0]) != "length"
        events = self._items.end(complete)
        response = response_end(self._head, self._turn, self._items.items)
        self._keep(response)
        return [*events, {"type": f"response.{response['status']}", "response": response}]

    def _rendered(self, events: Sequence[Event]) -> bytes:
        parts = []
        for event in events:
            parts.append(f"event: {event['type']}\ndata: {compact({**event, 'sequence_number': self._num_events})}\n\n")
            self._num_events += 1
        return "".join(parts).encode()
