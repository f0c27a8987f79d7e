"""Hermes' format, that of Qwen 2.5 and 3 too: <tool_call>{"name": ..., "arguments": {...}}</tool_call>, anywhere in the text."""

from jaxserve.chat_output.json_call import JsonCall
from jaxserve.chat_output.marker import Marker, OptionalMarker
from jaxserve.chat_output.message import MessageWriter

BEGIN, END = "<tool_call>", "</tool_call>"


class HermesParser:
    """Finds the calls; see tool_call_parser. One that is never closed counts, as far as it came."""

    def __init__(self, writer: MessageWriter):
        self._writer = writer
        self._begin = Marker(BEGIN)
        self._call: JsonCall | None = None
        self._end: OptionalMarker | None = None

    def push(self, text: str) -> None:
        while text:
            if self._end is not None:
                behind = self._end.push(text)
                if behind is None:
                    return
                self._end, text = None, behind
            elif self._call is not None:
                text = self._read_call(self._call, text)
            else:
                before, behind = self._begin.push(text)
                self._writer.content(before)
                if behind is None:
                    return
                self._call = JsonCall(self._writer)
                text = behind

    def flush(self) -> None:
        self._writer.content(self._begin.flush())
        if self._call is not None:
            if self._call.begun:
                self._call.flush()
            else:
                self._writer.content(BEGIN + self._call.raw())
        elif self._end is not None:
            self._writer.content(self._end.flush())

    def _read_call(self, call: JsonCall, text: str) -> str:
        position = call.push(text)
        if call.broken:
            self._writer.content(BEGIN + call.raw())
            self._call = None
        elif call.done:
            self._call = None
            self._end = OptionalMarker(END)
        return text[position:]
