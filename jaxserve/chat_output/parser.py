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
        alone: the answer is tool calls or has none: what does not begin with the format's marker, or with what else begins a call in
            it, is content, whatever stands in it.
    """

    def __init__(
        self,
        tool_format: ToolFormat | None,
        names: Container[str] = (),
        reasoning: str = "",
        parallel: bool = True,
        alone: bool = False,
    ):
        self._writer = MessageWriter(parallel, tool_format.new_call_id) if tool_format is not None else MessageWriter()
        self._tool_calls = tool_format.new_parser(self._writer, names) if tool_format is not None else None
        self._reasoning = ReasoningParser(self._writer, reasoning == "begun") if reasoning else None
        self._beginnings = (tool_format.marker, *tool_format.bare) if tool_format is not None and alone else ()
        self._head = ""  # held back while it may become one of the beginnings

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
            self._push_answer(self._head, decided=True)
            if self._tool_calls is not None:
                self._tool_calls.flush()
            self._writer.end()
        return self._writer.take()

    def _push_answer(self, text: str, decided: bool = False) -> None:
        if not text:
            return
        if self._beginnings:
            self._head = text if decided else self._head + text
            bare = self._head.lstrip()
            if not decided and any(len(bare) < len(begin) and begin.startswith(bare) for begin in self._beginnings):
                return
            if not bare.startswith(self._beginnings):
                self._tool_calls = None
            text, self._head, self._beginnings = self._head, "", ()
        if self._tool_calls is not None:
            self._tool_calls.push(text)
        else:
            self._writer.content(text)
