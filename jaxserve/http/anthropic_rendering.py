"""Answers in Anthropic's words: the message, and the stream of events about it (see sse.Events)."""

import json
import uuid
from collections.abc import Mapping
from typing import Any

from jaxserve.chat_output import MessageDelta
from jaxserve.errors import JaxserveError
from jaxserve.http.errors import anthropic_error, failure_kind
from jaxserve.http.service import Service
from jaxserve.http.sse import compact
from jaxserve.http.turn import Message, Turn
from jaxserve.request import FinishReason

Event = dict[str, Any]


def message_head(service: Service, message_id: str) -> dict[str, Any]:
    """A message before there is an answer; its usage comes behind."""
    return {
        "id": message_id,
        "type": "message",
        "role": "assistant",
        "model": service.model_name,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
    }


def message_body(head: Mapping[str, Any], turn: Turn, message: Message) -> dict[str, Any]:
    """The answer to POST /v1/messages."""
    content: list[dict[str, Any]] = []
    if message.reasoning:
        content.append({"type": "thinking", "thinking": message.reasoning, "signature": ""})
    if message.content:
        content.append({"type": "text", "text": message.content})
    content += [tool_use_block(call.id, call.name, call.arguments) for call in message.tool_calls]
    return {**head, "content": content, **stop_fields(turn), "usage": message_usage(turn)}


def tool_use_block(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    """A tool call; arguments that are no JSON object are told as they are, under a name of their own."""
    try:
        told = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        told = None
    return {"type": "tool_use", "id": call_id, "name": name, "input": told if isinstance(told, dict) else {"invalid_json": arguments}}


def stop_fields(turn: Turn) -> dict[str, Any]:
    """Why the message ended."""
    (sample,) = turn.answers.samples
    reason = turn.finish_reason(sample)
    if reason == "tool_calls":
        return {"stop_reason": "tool_use", "stop_sequence": None}
    if sample.finish_reason is FinishReason.STOP and sample.stop is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": sample.stop}
    return {"stop_reason": "max_tokens" if reason == "length" else "end_turn", "stop_sequence": None}


def message_usage(turn: Turn) -> dict[str, int]:
    """Tokens so far; those of cached prefixes apart, as Anthropic counts them."""
    (answer,) = turn.answers.answers
    cached = answer.meter.num_cached_tokens
    return {
        "input_tokens": len(answer.request.prompt_token_ids) - cached,
        "cache_read_input_tokens": cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": turn.answers.num_output_tokens,
    }


class MessageEvents:
    """The events of a streamed message: its blocks one after the other.

    Args:
        service: metrics.
        turn: to be read.
        head: of the message.
    """

    def __init__(self, service: Service, turn: Turn, head: Mapping[str, Any]):
        self._service = service
        self._turn = turn
        self._head = head
        self._begun = False
        self._over = False
        self._block: str | None = None  # kind of the open block
        self._num_blocks = 0

    async def read(self) -> bytes:
        while not self._over:
            tokens = await self._turn.read()
            events: list[Event] = []
            if not self._begun:
                self._begun = True
                usage = {**message_usage(self._turn), "output_tokens": 0}
                events += [{"type": "message_start", "message": {**self._head, "usage": usage}}, {"type": "ping"}]
            for _, delta in tokens:
                self._add(delta, events)
            if not tokens:
                self._over = True
                self._close(events)
                events.append({"type": "message_delta", "delta": stop_fields(self._turn), "usage": message_usage(self._turn)})
                events.append({"type": "message_stop"})
            if events:
                return _rendered(events)
        return b""

    def failed(self, error: JaxserveError) -> bytes:
        self._service.metrics.tgi_failure.labels(failure_kind(error)).inc()
        return _rendered([anthropic_error(error)[1]])

    def abort(self) -> None:
        self._turn.answers.abort()

    def _add(self, delta: MessageDelta, events: list[Event]) -> None:
        if delta.reasoning:
            self._open("thinking", {"type": "thinking", "thinking": "", "signature": ""}, events)
            events.append(self._delta({"type": "thinking_delta", "thinking": delta.reasoning}))
        if delta.content:
            self._open("text", {"type": "text", "text": ""}, events)
            events.append(self._delta({"type": "text_delta", "text": delta.content}))
        for call in delta.tool_calls:
            if call.name is not None:
                self._close(events)
                self._open("tool_use", {"type": "tool_use", "id": call.id, "name": call.name, "input": {}}, events)
            if call.arguments:
                events.append(self._delta({"type": "input_json_delta", "partial_json": call.arguments}))

    def _open(self, kind: str, block: dict[str, Any], events: list[Event]) -> None:
        if self._block == kind:
            return
        self._close(events)
        self._block = kind
        self._num_blocks += 1
        events.append({"type": "content_block_start", "index": self._num_blocks - 1, "content_block": block})

    def _delta(self, delta: dict[str, Any]) -> Event:
        return {"type": "content_block_delta", "index": self._num_blocks - 1, "delta": delta}

    def _close(self, events: list[Event]) -> None:
        if self._block is not None:
            events.append({"type": "content_block_stop", "index": self._num_blocks - 1})
            self._block = None


def _rendered(events: list[Event]) -> bytes:
    return "".join([f"event: {event['type']}\ndata: {compact(event)}\n\n" for event in events]).encode()


def new_message_id() -> str:
    """An id such as "msg_..."."""
    return f"msg_{uuid.uuid4().hex}"
