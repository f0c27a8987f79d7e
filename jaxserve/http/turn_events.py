"""Answers with tool calls or reasoning, streamed as OpenAI's chunks: an event for each token that adds something."""

from collections.abc import Sequence
from typing import Any

from jaxserve.chat_output import MessageDelta, ToolCallDelta
from jaxserve.http.answer import Sample
from jaxserve.http.openai_events import ChatEvents
from jaxserve.http.openai_rendering import turn_usage
from jaxserve.http.openai_types import ChatBody
from jaxserve.http.service import Service
from jaxserve.http.sse import compact
from jaxserve.http.turn import Turn


class TurnEvents(ChatEvents):
    """Chunks of /v1/chat/completions (see sse.Events).

    Args:
        turn: to be read.
        Others as in ChatEvents.
    """

    def __init__(self, service: Service, turn: Turn, head: dict[str, Any], body: ChatBody, echoes: Sequence[str]):
        super().__init__(service, turn.answers, head, body, echoes)
        self._turn = turn
        self._tells_reasoning = body.include_reasoning is not False

    async def read(self) -> bytes:
        while not self._over:
            parts: list[str] = []
            tokens = await self._turn.read()
            if not tokens:
                self._over = True
                parts.append(self._last_events())
            for token, delta in tokens:
                choice = token.sample.choice
                if choice in self._unopened:
                    self._unopened.remove(choice)
                    parts += self._first_events(choice)
                self._num_told += token.token_id >= 0
                told = self._told(delta)
                if not told and token.logprobs is None and token.finish_reason is None and not self._tells_ids:
                    continue
                parts.append(f'{self._head},"choices":[{{"index":{choice},"delta":{compact(told)[:-1]}')
                parts.append(self._token_closing(token))
            if parts:
                return "".join(parts).encode()
        return b""

    def _told(self, delta: MessageDelta) -> dict[str, Any]:
        told: dict[str, Any] = {}
        if delta.reasoning and self._tells_reasoning:
            told["reasoning_content"] = delta.reasoning
        if delta.content:
            told["content"] = delta.content
        if delta.tool_calls:
            told["tool_calls"] = [tool_call_delta(call) for call in delta.tool_calls]
        return told

    def _finish_reason(self, sample: Sample) -> str | None:
        return self._turn.finish_reason(sample)

    def _usage(self, num_told: int | None = None) -> dict[str, Any]:
        return turn_usage(self._turn, num_told)


def tool_call_delta(call: ToolCallDelta) -> dict[str, Any]:
    """What a chunk adds to a tool call."""
    if call.name is None:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    return {"index": call.index, "id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
