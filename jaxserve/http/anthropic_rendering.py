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
from jaxserve.http.turn import Turn
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


def message_end(head: Mapping[str, Any], turn: Turn, blocks: "MessageBlocks") -> dict[str, Any]:
    """The answer to POST /v1/messages."""
    return {**head, "content": blocks.told(), **stop_fields(turn), "usage": message_usage(turn)}


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


class MessageBlocks:
    """The content of a message, put together as it comes: blocks, and the events that tell of them."""

    def __init__(self) -> None:
        self._blocks: list[dict[str, Any]] = []
        self._pieces: list[list[str]] = []  # of each block's text
        self._open = False

    def push(self, delta: MessageDelta) -> list[Event]:
        """Take the next part; returns its events."""
        events: list[Event] = []
        if delta.reasoning:
            self._begin({"type": "thinking", "thinking": "", "signature": ""}, events)
            self._add({"type": "thinking_delta", "thinking": delta.reasoning}, delta.reasoning, events)
        if delta.content:
            self._begin({"type": "text", "text": ""}, events)
            self._add({"type": "text_delta", "text": delta.content}, delta.content, events)
        for call in delta.tool_calls:
            if call.name is not None:
                self.end(events)
                self._begin({"type": "tool_use", "id": call.id, "name": call.name, "input": {}}, events)
            if call.arguments:
                self._add({"type": "input_json_delta", "partial_json": call.arguments}, call.arguments, events)
        return events

    def end(self, events: list[Event]) -> None:
        """Close the open block, if there is one."""
        if self._open:
            self._open = False
            events.append({"type": "content_block_stop", "index": len(self._blocks) - 1})

    def told(self) -> list[dict[str, Any]]:
        """All blocks, whole."""
        return [_filled(block, "".join(pieces)) for block, pieces in zip(self._blocks, self._pieces, strict=True)]

    def _begin(self, block: dict[str, Any], events: list[Event]) -> None:
        if self._open and self._blocks[-1]["type"] == block["type"]:
            return
        self.end(events)
        self._open = True
        self._blocks.append(block)
        self._pieces.append([])
        events.append({"type": "content_block_start", "index": len(self._blocks) - 1, "content_block": block})

    def _add(self, delta: dict[str, Any], text: str, events: list[Event]) -> None:
        self._pieces[-1].append(text)
        events.append({"type": "content_block_delta", "index": len(self._blocks) - 1, "delta": delta})


def _filled(block: dict[str, Any], text: str) -> dict[str, Any]:
    """A block with its text; arguments that are no JSON object are told as they are, under a name of their own."""
    if block["type"] != "tool_use":
        return {**block, block["type"]: text}
    try:
        told = json.loads(text or "{}")
    except (ValueError, RecursionError):
        told = None
    return {**block, "input": told if isinstance(told, dict) else {"invalid_json": text}}


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
        self._blocks = MessageBlocks()

    async def read(self) -> bytes:
        while not self._over:
            tokens = await self._turn.read()
            events: list[Event] = []
            if not self._begun:
                self._begun = True
                usage = {**message_usage(self._turn), "output_tokens": 0}
                events += [{"type": "message_start", "message": {**self._head, "usage": usage}}, {"type": "ping"}]
            for _, delta in tokens:
                events += self._blocks.push(delta)
            if not tokens:
                self._over = True
                self._blocks.end(events)
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


def _rendered(events: list[Event]) -> bytes:
    return "".join([f"event: {event['type']}\ndata: {compact(event)}\n\n" for event in events]).encode()


def new_message_id() -> str:
    """An id such as "msg_..."."""
    return f"msg_{uuid.uuid4().hex}"
