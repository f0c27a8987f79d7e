"""Responses that are kept in memory, for previous_response_id."""

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MAX_RESPONSES = 4096
MAX_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A response and the conversation up to it.

    Attributes:
        body: as it was answered.
        messages: all of the conversation but instructions, as chat templates take them; those of earlier responses are shared.
        num_bytes: what this response added, about.
    """

    body: Mapping[str, Any]
    messages: Sequence[Mapping[str, Any]]
    num_bytes: int


class ResponseStore:
    """Keeps the responses that were used last.

    Args:
        max_responses, max_bytes: beyond them the oldest are forgotten.
    """

    def __init__(self, max_responses: int = MAX_RESPONSES, max_bytes: int = MAX_BYTES):
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._responses: OrderedDict[str, StoredResponse] = OrderedDict()

    def get(self, response_id: str) -> StoredResponse | None:
        """A response that is still there."""
        response = self._responses.get(response_id)
        if response is not None:
            self._responses.move_to_end(response_id)
        return response

    def add(self, body: Mapping[str, Any], earlier: Sequence[Mapping[str, Any]], messages: Sequence[Mapping[str, Any]]) -> None:
        """Keep a response.

        Args:
            body: with its id.
            earlier: the conversation before it.
            messages: what it added to it.
        """
        num_bytes = len(json.dumps([body, messages])) + 8 * len(earlier)
        self._responses[body["id"]] = StoredResponse(body, [*earlier, *messages], num_bytes)
        self._num_bytes += num_bytes
        while self._responses and (len(self._responses) > self._max_responses or self._num_bytes > self._max_bytes):
            self.remove(next(iter(self._responses)))

    def remove(self, response_id: str) -> bool:
        """Forget a response; whether it was there."""
        response = self._responses.pop(response_id, None)
        if response is not None:
            self._num_bytes -= response.num_bytes
        return response is not None
