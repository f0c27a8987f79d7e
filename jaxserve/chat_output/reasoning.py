"""The reasoning of a thinking model: <think>...</think> before the answer."""

from jaxserve.chat_output.marker import Marker
from jaxserve.chat_output.message import MessageWriter

BEGIN, END = "<think>", "</think>"


class ReasoningParser:
    """Cuts the reasoning off.

    Args:
        writer: where it goes.
        begun: the text begins within the reasoning, because the prompt ends with its begin; the marker may come again.

    Attributes:
        begun: the text is within the reasoning, or was.
        over: what follows is the answer.
    """

    def __init__(self, writer: MessageWriter, begun: bool):
        self.begun = begun
        self.over = False
        self._writer = writer
        self._head: str | None = ""  # held back while it may become the begin marker
        self._end = Marker(END)

    def push(self, text: str) -> str:
        """Take text; returns what is left of it behind the reasoning."""
        if self._head is not None:
            head = self._head + text
            bare = head.lstrip()
            if len(bare) < len(BEGIN) and BEGIN.startswith(bare):
                self._head = head
                return ""
            self._head = None
            if bare.startswith(BEGIN):
                self.begun = True
                text = bare.removeprefix(BEGIN)
            elif self.begun:
                text = head
            else:
                self.over = True
                return head
        before, behind = self._end.push(text)
        self._writer.reasoning(before)
        if behind is None:
            return ""
        self.over = True
        self._writer.end_reasoning()
        return behind

    def flush(self) -> str:
        """No more text comes; returns what turned out to belong to the answer."""
        if self._head is not None and not self.begun:
            return self._head
        self._writer.reasoning((self._head or "") + self._end.flush())
        return ""
