"""Responses that are kept in memory, for previous_response_id."""

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MAX_RESPONSES = 4096
MAX_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True, eq=False)
class ConversationPart:
    """What one response added to a conversation; the responses after it hold the same object.

    Attributes:
        input_items: of the request, as OpenAI tells them.
        messages: input and output as chat templates take them; no instructions.
        output: items.
        num_bytes: as JSON, with all else that the response tells.
    """

    input_items: Sequence[Mapping[str, Any]]
    messages: Sequence[Mapping[str, Any]]
    output: Sequence[Mapping[str, Any]]
    num_bytes: int


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A response and the conversation up to it.

    Attributes:
        body: as it was answered.
        parts: of the conversation; the last is its own.
    """

    body: Mapping[str, Any]
    parts: Sequence[ConversationPart]

    @property
    def messages(self) -> list[Mapping[str, Any]]:
        """All of the conversation but instructions, as chat templates take them."""
        return [message for part in self.parts for message in part.messages]

    @property
    def input_items(self) -> list[Mapping[str, Any]]:
        """What it was made from: inputs and outputs before it, and its own input."""
        *earlier, own = self.parts
        return [item for part in earlier for item in (*part.input_items, *part.output)] + list(own.input_items)


class ResponseStore:
    """Keeps the responses that were used last.

    Args:
        max_responses, max_bytes: beyond them the oldest are forgotten. A part of a conversation counts as long as a response after it
            is kept, and once.
    """

    def __init__(self, max_responses: int = MAX_RESPONSES, max_bytes: int = MAX_BYTES):
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._responses: OrderedDict[str, StoredResponse] = OrderedDict()
        self._num_users: dict[ConversationPart, int] = {}  # responses that hold a part

    def get(self, response_id: str) -> StoredResponse | None:
        """A response that is still there."""
        response = self._responses.get(response_id)
        if response is not None:
            self._responses.move_to_end(response_id)
        return response

    def add(
        self,
        body: Mapping[str, Any],
        earlier: Sequence[ConversationPart],
        input_items: Sequence[Mapping[str, Any]],
        messages: Sequence[Mapping[str, Any]],
    ) -> None:
        """Keep a response.

        Args:
            body: with its id.
            earlier: the conversation before it.
            input_items, messages: what it added to it.
        """
        num_bytes = len(json.dumps([body, input_items, messages]))
        parts = [*earlier, ConversationPart(input_items, messages, body["output"], num_bytes)]
        self._responses[body["id"]] = StoredResponse(body, parts)
        for part in parts:
            users = self._num_users[part] = self._num_users.get(part, 0) + 1
            self._num_bytes += part.num_bytes if users == 1 else 0
        while self._responses and (len(self._responses) > self._max_responses or self._num_bytes > self._max_bytes):
            self.remove(next(iter(self._responses)))

    def remove(self, response_id: str) -> bool:
        """Forget a response; whether it was there."""
        response = self._responses.pop(response_id, None)
        if response is None:
            return False
        for part in response.parts:
            self._num_users[part] -= 1
            if not self._num_users[part]:
                del self._num_users[part]
                self._num_bytes -= part.num_bytes
        return True
