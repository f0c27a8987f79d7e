"""A tool call written as a JSON object, {"name": ..., "arguments": {...}}, read as it comes."""

import enum
import json
from collections.abc import Container

from jaxserve.chat_output.json_value import JsonValue
from jaxserve.chat_output.message import MessageWriter

_SPACE = " \t\n\r"
_NAME_KEYS = ("name", "function")
_ARGUMENT_KEYS = ("arguments", "parameters")
MAX_NAME = 256


class _State(enum.Enum):
    OBJECT = enum.auto()  # "{" comes
    KEY = enum.auto()  # a key or "}"
    COLON = enum.auto()
    VALUE = enum.auto()
    ARGUMENTS = enum.auto()  # inside the arguments' value
    OTHER = enum.auto()  # inside any other value
    COMMA = enum.auto()  # "," or "}"
    CLOSED = enum.auto()


class JsonCall:
    """Reads one object. The call is told as soon as its name is known and its arguments begin; if they come first, they wait.

    `parameters` is another name of `arguments`, `function` of `name`; OpenAI's {"type": "function", "function": {...}} is understood
    too. Arguments that are a string of JSON are told as that JSON.

    Args:
        writer: where the call goes.
        names: functions that may be called; None: any.

    Attributes:
        begun: the call was told.
        done: the object is complete.
        broken: it is no tool call; nothing was told, and `raw()` holds its text.
    """

    def __init__(self, writer: MessageWriter, names: Container[str] | None = None):
        self.begun = False
        self.done = False
        self.broken = False
        self._raw: list[str] = []
        self._writer = writer
        self._names = names
        self._state = _State.OBJECT
        self._depth = 0  # objects that are open
        self._value = JsonValue()
        self._text: list[str] = []  # of a value that is held back
        self._key = ""
        self._name: str | None = None
        self._arguments: str | None = None
        self._holds: bool | None = None  # whether arguments wait for their end: all but objects and arrays do

    def push(self, text: str, start: int = 0) -> int:
        """Take text from `start` on; returns where it goes on behind the object, or where it broke."""
        position = start
        while position < len(text) and not self.done and not self.broken:
            if self._state in (_State.KEY, _State.ARGUMENTS, _State.OTHER) and self._reading(text[position]):
                position = self._read_value(text, position)
            else:
                position = self._read_mark(text, position)
        if not self.begun:
            self._raw.append(text[start:position])
        return position

    def raw(self) -> str:
        """What was read while the call had not begun."""
        return "".join(self._raw)

    def flush(self) -> None:
        """No more text comes: arguments that are held back are told as far as they came."""
        if self._state is _State.ARGUMENTS and self.begun:
            self._writer.arguments("".join(self._text))

    def _reading(self, character: str) -> bool:
        return bool(self._text) or self._state is not _State.KEY or character == '"'

    def _read_mark(self, text: str, position: int) -> int:
        character = text[position]
        if character in _SPACE:
            return position + 1
        match self._state, character:
            case _State.OBJECT, "{":
                self._depth = 1
                self._state = _State.KEY
            case ((_State.KEY | _State.COMMA), "}"):
                return self._close(position)
            case _State.COLON, ":":
                self._state = _State.VALUE
            case _State.COMMA, ",":
                self._state = _State.KEY
            case _State.VALUE, "{" if self._key == "function" and self._name is None:
                self._depth += 1
                self._state = _State.KEY
            case _State.VALUE, _:
                self._begin_value()
                return position
            case _:
                self._break()
                return position
        return position + 1

    def _begin_value(self) -> None:
        is_arguments = self._key in _ARGUMENT_KEYS and self._arguments is None
        self._state = _State.ARGUMENTS if is_arguments else _State.OTHER
        if is_arguments and self._name is not None:
            self._begin()

    def _read_value(self, text: str, position: int) -> int:
        piece, position = self._value.push(text, position)
        if self._state is _State.ARGUMENTS and self.begun and not self._is_held(piece):
            self._writer.arguments(piece)
        else:
            self._text.append(piece)
        if not self._value.done:
            return position
        held = "".join(self._text)
        self._value, self._text = JsonValue(), []
        if self._state is _State.KEY:
            self._key = held[1:-1]
            self._state = _State.COLON
        elif self._state is _State.ARGUMENTS:
            self._arguments = held
            if self.begun and (held or self._holds is None):
                self._writer.arguments(plain_arguments(held))
            self._state = _State.COMMA
        else:
            if not held:
                self._break()
                return position
            if self._key in _NAME_KEYS and self._name is None:
                self._take_name(held)
            self._state = _State.COMMA
        return position

    def _is_held(self, piece: str) -> bool:
        if self._holds is None and piece:
            self._holds = piece[0] not in "{["
        return bool(self._holds)

    def _take_name(self, text: str) -> None:
        try:
            name = json.loads(text)
        except ValueError:
            name = None
        if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or (self._names is not None and name not in self._names):
            self._break()
            return
        self._name = name
        if self._arguments is not None:
            self._begin()

    def _begin(self) -> None:
        assert self._name is not None
        self.begun = True
        self._raw.clear()
        self._writer.call(self._name)
        if self._arguments is not None:
            self._writer.arguments(plain_arguments(self._arguments))

    def _close(self, position: int) -> int:
        self._depth -= 1
        self._state = _State.COMMA
        if self._depth == 0:
            if self._name is None:
                self._break()
                return position
            if not self.begun:
                self._arguments = self._arguments or "{}"
                self._begin()
            self.done = True
            self._state = _State.CLOSED
        return position + 1

    def _break(self) -> None:
        # A call that was told stays told: what follows is no part of it.
        if self.begun:
            self.done = True
        else:
            self.broken = True


def plain_arguments(text: str) -> str:
    """Arguments that were held back as the JSON text of an object, where they are that in disguise: a string of JSON, or null."""
    if text.startswith('"'):
        try:
            inner = json.loads(text)
        except ValueError:
            return text
        return inner or "{}"
    return "{}" if text in ("null", "") else text
