"""Several calls as JSON objects one after the other, or as an array of them."""

from collections.abc import Container

from jaxserve.chat_output.json_call import JsonCall
from jaxserve.chat_output.message import MessageWriter

_SEPARATORS = " \t\n\r,;"


class JsonCalls:
    """Reads objects until something else comes.

    Args:
        writer: where the calls go.
        names: functions that may be called; None: any.
        prefix: goes before the text if it turns out to hold no call.

    Attributes:
        done: something else came.
    """

    def __init__(self, writer: MessageWriter, names: Container[str] | None = None, prefix: str = ""):
        self.done = False
        self._writer = writer
        self._names = names
        self._between = [prefix]  # text since the last call, in case no other follows
        self._num_calls = 0
        self._in_array = False
        self._call: JsonCall | None = None

    def push(self, text: str) -> str:
        """Take text; returns what is left of it behind the calls."""
        position = 0
        while position < len(text) and not self.done:
            if self._call is not None:
                position = self._read_call(self._call, text, position)
                continue
            character = text[position]
            if character == "{":
                self._call = JsonCall(self._writer, self._names)
                continue
            position += 1
            if character == "[" and not self._in_array and not self._num_calls:
                self._in_array = True
            elif character == "]" and self._in_array and self._num_calls:
                self._between.clear()
                self._end()
                return text[position:]
            elif character not in _SEPARATORS or (character in ",;" and not self._num_calls):
                position -= 1
                self._end()
                break
            self._between.append(character)
        return text[position:]

    def flush(self) -> None:
        """No more text comes."""
        if self.done:
            return
        if self._call is not None and self._call.begun:
            self._call.flush()
            return
        if self._call is not None:
            self._between.append(self._call.raw())
        elif self._num_calls:
            self._between.clear()
        self._end()

    def _read_call(self, call: JsonCall, text: str, position: int) -> int:
        position = call.push(text, position)
        if call.broken:
            self._between.append(call.raw())
            self._end()
        elif call.done:
            self._num_calls += 1
            self._call = None
        if call.begun:
            self._between.clear()
        return position

    def _end(self) -> None:
        self.done = True
        self._call = None
        self._writer.content("".join(self._between))
