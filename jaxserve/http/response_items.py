"""The output of a response, put together as it comes: items, and the events that tell of them."""

import uuid
from collections.abc import Sequence
from typing import Any

from jaxserve.chat_output import MessageDelta, ToolCallDelta

Event = dict[str, Any]


def new_id(prefix: str) -> str:
    """An id such as "msg_..."."""
    return f"{prefix}_{uuid.uuid4().hex}"


class ResponseItems:
    """Takes what tokens add to a message; each kind of part is an item of its own.

    Attributes:
        items: the output so far, as OpenAI tells it; the last may be unfinished.
    """

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._open = False
        self._pieces: list[str] = []
        self._logprobs: list[dict[str, Any]] = []  # of tokens whose text is still held back

    def push(self, delta: MessageDelta, logprobs: Sequence[dict[str, Any]] = ()) -> list[Event]:
        """Take the next part; returns its events, without their numbers."""
        events: list[Event] = []
        if delta.reasoning:
            self._begin("reasoning", events)
            self._add("response.reasoning_text.delta", delta.reasoning, events)
        self._logprobs += logprobs
        if delta.content:
            self._begin("message", events)
            self._add("response.output_text.delta", delta.content, events, {"logprobs": self._logprobs})
            self.items[-1]["content"][0]["logprobs"] += self._logprobs
        if delta.content or delta.tool_calls or delta.reasoning:
            self._logprobs = []
        for call in delta.tool_calls:
            self._add_call(call, events)
        return events

    def end(self, complete: bool) -> list[Event]:
        """Nothing more comes; an answer without anything is an empty message.

        Args:
            complete: False: the last item was cut off.
        """
        events: list[Event] = []
        if not self.items:
            self._begin("message", events)
        self._finish(events, "completed" if complete else "incomplete")
        return events

    def _begin(self, kind: str, events: list[Event]) -> None:
        if self._open and self.items[-1]["type"] == kind:
            return
        self._finish(events)
        part: dict[str, Any]
        if kind == "message":
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            item = {"id": new_id("msg"), "type": "message", "role": "assistant", "status": "in_progress", "content": []}
        else:
            part = {"type": "reasoning_text", "text": ""}
            item = {"id": new_id("rs"), "type": "reasoning", "summary": [], "status": "in_progress", "content": []}
        self._open_item(item, events)
        events.append(self._event("response.content_part.added", part={**part}, content_index=0))
        item["content"].append(part)

    def _open_item(self, item: dict[str, Any], events: list[Event]) -> None:
        self._open = True
        self._pieces = []
        self.items.append(item)
        told = {**item, **({"content": []} if "content" in item else {})}
        events.append({"type": "response.output_item.added", "output_index": len(self.items) - 1, "item": told})

    def _add(self, kind: str, text: str, events: list[Event], more: dict[str, Any] | None = None) -> None:
        self._pieces.append(text)
        events.append(self._event(kind, content_index=0, delta=text, **(more or {})))

    def _add_call(self, call: ToolCallDelta, events: list[Event]) -> None:
        if call.name is not None:
            self._finish(events)
            item = {"id": new_id("fc"), "type": "function_call", "call_id": call.id, "name": call.name, "arguments": ""}
            self._open_item({**item, "status": "in_progress"}, events)
        if call.arguments:
            self._pieces.append(call.arguments)
            events.append(self._event("response.function_call_arguments.delta", delta=call.arguments))

    def _finish(self, events: list[Event], status: str = "completed") -> None:
        if not self._open:
            return
        self._open = False
        item, text = self.items[-1], "".join(self._pieces)
        item["status"] = status
        if item["type"] == "function_call":
            item["arguments"] = text
            events.append(self._event("response.function_call_arguments.done", name=item["name"], arguments=text))
        else:
            part = item["content"][0]
            part["text"] = text
            if item["type"] == "message":
                events.append(self._event("response.output_text.done", content_index=0, text=text, logprobs=part["logprobs"]))
            else:
                events.append(self._event("response.reasoning_text.done", content_index=0, text=text))
            events.append(self._event("response.content_part.done", content_index=0, part=part))
        events.append({"type": "response.output_item.done", "output_index": len(self.items) - 1, "item": item})

    def _event(self, kind: str, **fields: Any) -> Event:
        return {"type": kind, "item_id": self.items[-1]["id"], "output_index": len(self.items) - 1, **fields}
