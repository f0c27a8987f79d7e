"""Llama 3's format: the answer is {"name": ..., "parameters": {...}}, after <|python_tag|> or not; several calls follow one another."""

from collections.abc import Container

from jaxserve.chat_output.json_calls import JsonCalls
from jaxserve.chat_output.marker import Marker
from jaxserve.chat_output.message import MessageWriter

BEGIN = "<|python_tag|>"


class Llama3JsonParser:
    """Finds the calls; see tool_call_parser.

    JSON without the tag is a call only at the start of the answer, and everywhere only with the name of a known function: an answer
    in JSON is not to be taken for one.

    Args:
        names: of the functions that may be called.
    """

    def __init__(self, writer: MessageWriter, names: Container[str]):
        self._writer = writer
        self._names = names
        self._begin = Marker(BEGIN)
        self._calls: JsonCalls | None = JsonCalls(writer, names)

    def push(self, text: str) -> None:
        while text:
            if self._calls is not None:
                text = self._calls.push(text)
                if self._calls.done:
                    self._calls = None
                continue
            before, behind = self._begin.push(text)
            self._writer.content(before)
            if behind is None:
                return
            self._calls = JsonCalls(self._writer, self._names, BEGIN)
            text = behind

    def flush(self) -> None:
        self._writer.content(self._begin.flush())
        if self._calls is not None:
            self._calls.flush()
