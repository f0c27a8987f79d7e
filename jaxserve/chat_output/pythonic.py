"""The pythonic format of Llama 3.2 and 4: the whole answer is [name(argument=value, ...), ...], with values as Python writes them."""

import re
from collections.abc import Container

from jaxserve.chat_output.marker import OptionalMarker
from jaxserve.chat_output.message import MessageWriter
from jaxserve.chat_output.python_value import PythonValue

END = "<|python_end|>"
MAX_HEAD = 1024  # more than any of the expressions below can match
_OPENING = re.compile(r"\s{0,64}(?:<\|python_start\|>)?\s{0,64}\[")
_CALL = re.compile(r"\s{0,64}([A-Za-z_][\w.-]{0,255})\s{0,8}\(\s{0,64}(?:([A-Za-z_]\w{0,255})\s{0,8}=(?!=)\s{0,8}(?=[^\s=])|\))")
_ARGUMENT = re.compile(r"\s{0,64},?\s{0,64}(?:([A-Za-z_]\w{0,255})\s{0,8}=(?!=)\s{0,8}(?=[^\s=])|\))")
_NEXT = re.compile(r"\s{0,64}(?:,|(\]))")
_LEGAL = re.compile(r"[\s\[\](),=\w.<|>-]*")


class PythonicParser:
    """Finds the calls; see tool_call_parser. The answer must begin with them, and they must name known functions.

    Args:
        names: of the functions that may be called.
    """

    def __init__(self, writer: MessageWriter, names: Container[str]):
        self._writer = writer
        self._names = names
        self._awaits: re.Pattern[str] | None = _OPENING
        self._held = ""
        self._raw = ""  # in case that no call follows
        self._value: PythonValue | None = None
        self._end: OptionalMarker | None = None
        self._over = False

    def push(self, text: str) -> None:
        while text:
            if self._end is not None:
                behind = self._end.push(text)
                if behind is None:
                    return
                self._end, self._over, text = None, True, behind
            elif self._over:
                self._writer.content(text)
                return
            elif self._value is not None:
                text = self._read_value(self._value, text)
            else:
                text = self._read_form(self._held + text)

    def flush(self) -> None:
        if self._value is not None:
            self._writer.arguments(self._value.flush())
        elif self._end is not None:
            self._writer.content(self._end.flush())
        elif not self._over:
            self._give_up()

    def _read_value(self, value: PythonValue, text: str) -> str:
        piece, position = value.push(text)
        self._writer.arguments(piece)
        if value.broken:
            self._value = None
            self._over = True
        elif value.done:
            self._value = None
            self._awaits = _ARGUMENT
        return text[position:]

    def _read_form(self, text: str) -> str:
        """Take the text between values, as soon as there is enough of it; returns what is left."""
        self._held = ""
        assert self._awaits is not None
        match = self._awaits.match(text)
        if match is None:
            legal = _LEGAL.match(text)
            self._held = text
            if len(text) > MAX_HEAD or legal is None or legal.end() < len(text):
                self._give_up()
            return ""
        if self._awaits is _OPENING:
            self._raw = match[0]
            self._awaits = _CALL
        elif self._awaits is _CALL:
            if match[1] not in self._names:
                self._held = text
                self._give_up()
                return ""
            self._raw = ""
            self._writer.call(match[1])
            self._begin_argument(match[2], "{")
        elif self._awaits is _ARGUMENT:
            self._begin_argument(match[1], ", ")
        else:
            self._awaits = _CALL
            if match[1] is not None:
                self._end = OptionalMarker(END)
        return text[match.end() :]

    def _begin_argument(self, name: str | None, before: str) -> None:
        if name is None:
            self._writer.arguments("{}" if before == "{" else "}")
            self._awaits = _NEXT
        else:
            self._writer.arguments(f'{before}"{name}": ')
            self._value = PythonValue()

    def _give_up(self) -> None:
        self._over = True
        self._writer.content(self._raw + self._held)
        self._held = self._raw = ""
