"""Mistral's formats: [TOOL_CALLS][{"name": ..., "arguments": {...}}, ...], and since 2025 [TOOL_CALLS]name[ARGS]{...} for each call."""

import re

from jaxserve.chat_output.json_calls import JsonCalls
from jaxserve.chat_output.json_value import JsonValue
from jaxserve.chat_output.marker import Marker
from jaxserve.chat_output.message import MessageWriter

BEGIN = "[TOOL_CALLS]"
MAX_HEAD = 512  # more than _HEAD can match
# A function's name, perhaps a call's id, then its arguments.
_HEAD = re.compile(r"\s{0,64}([\w.-]{1,256})\s{0,8}(?:\[CALL_ID\]\s{0,8}[\w-]{0,64}\s{0,8})?(?:\[ARGS\]\s{0,8})?(?=\{)")
_HEAD_CHARACTERS = re.compile(r"[\w.\-\[\]\s]*")


class MistralParser:
    """Finds the calls; see tool_call_parser."""

    def __init__(self, writer: MessageWriter):
        self._writer = writer
        self._begin = Marker(BEGIN)
        self._head: str | None = None  # behind the marker, while it is not known which of the formats it is
        self._calls: JsonCalls | None = None
        self._arguments: JsonValue | None = None

    def push(self, text: str) -> None:
        while text:
            if self._calls is not None:
                text = self._calls.push(text)
                if self._calls.done:
                    self._calls = None
            elif self._arguments is not None:
                piece, position = self._arguments.push(text)
                self._writer.arguments(piece)
                if self._arguments.done:
                    self._arguments = None
                text = text[position:]
            elif self._head is not None:
                text = self._read_head(self._head + text)
            else:
                before, behind = self._begin.push(text)
                self._writer.content(before)
                if behind is None:
                    return
                self._head, text = "", behind

    def flush(self) -> None:
        self._writer.content(self._begin.flush())
        if self._calls is not None:
            self._calls.flush()
        elif self._head is not None:
            self._writer.content(BEGIN + self._head)

    def _read_head(self, text: str) -> str:
        bare = text.lstrip()
        if bare[:1] in ("[", "{"):
            self._head, self._calls = None, JsonCalls(self._writer, None, BEGIN)
            return text
        if (match := _HEAD.match(text)) is not None:
            self._head, self._arguments = None, JsonValue()
            self._writer.call(match[1])
            return text[match.end() :]
        characters = _HEAD_CHARACTERS.match(text)
        if len(text) > MAX_HEAD or characters is None or characters.end() < len(text):
            self._head = None
            self._writer.content(BEGIN)
            return text
        self._head = text
        return ""
