"""What a parser of tool calls is."""

from typing import Protocol


class ToolCallParser(Protocol):
    """Finds the tool calls in an answer; tells a MessageWriter of them and of the other text.

    A parser decides by the text so far alone, never by where it was cut, and takes time in proportion to it.
    """

    def push(self, text: str) -> None:
        """Take the next piece of text."""
        ...

    def flush(self) -> None:
        """No more text comes: what was held back is told."""
        ...
