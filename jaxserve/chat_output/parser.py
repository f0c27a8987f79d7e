"""MessageParser: the whole of it, for one answer."""

from collections.abc import Container

from jaxserve.chat_output.formats import ToolFormat
from jaxserve.chat_output.message import MessageDelta, MessageWriter
from jaxserve.chat_output.reasoning import ReasoningParser


class MessageParser:
    """Takes an answer's text, in whatever pieces, and tells what each adds to the message.

    The deltas joined are the same for every cutting of the text, and for the text in one piece.

    Args:
        tool_format: None: tool calls are not looked for.
        names: of the functions that may be called.
        reasoning: "" there is none, "possible": it may begin with <think>, "begun": the text begins within it.
        parallel: False: only the first tool call counts.
    """

    def __init__(self, tool_format: ToolFormat | None, names: Container[str] = (), reasoning: str = "", parallel: bool = True):
        self._writer = MessageWriter(parallel, tool_format.new_call_id) if tool_format is not None else MessageWriter()
        self._tool_calls = tool_format.new_parser(self._writer, names) if tool_format is not None else None
        self._reasoning = ReasoningParser(self._writer, reasoning == "begun") if reasoning else None

    @property
    def num_calls(self) -> int:
        """Tool calls so far."""
        return self._writer.num_calls

    @property
    def in_reasoning(self) -> bool:
        """Whether the text is within the reasoning, as far as it is known."""
        return self._reasoning is not None and self._reasoning.begun

    def push(self, text: str, last: bool = False) -> MessageDelta:
        """Take the next piece of text.

        Args:
            last: nothing follows it.
        """
        if self._reasoning is not None:
            text = self._reasoning.push(text)
            if last and not self._reasoning.over:
                text += self._reasoning.flush()
            if last or self._reasoning.over:
                self._reasoning = None
        self._push_answer(text)
        if last:
            if self._tool_calls is not None:
                self._tool_calls.flush()
            self._writer.end()
        return self._writer.take()

    def _push_answer(self, text: str) -> None:
        if not text:
            return
        if self._tool_calls is not None:
            self._tool_calls.push(text)
        else:
            self._writer.content(text)
