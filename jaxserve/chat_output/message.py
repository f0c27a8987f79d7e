"""The parts of an answer, as they come."""

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field


def long_call_id() -> str:
    """A tool call's id, as OpenAI makes them."""
    return f"call_{secrets.token_hex(12)}"


@dataclass(slots=True)
class ToolCallDelta:
    """What is added to one tool call.

    Attributes:
        index: which call of the message, from 0.
        name, id: of the function and of the call; only where the call begins, else None.
        arguments: the next piece of the arguments' JSON text.
    """

    index: int
    name: str | None = None
    id: str | None = None
    arguments: str = ""


@dataclass(slots=True)
class MessageDelta:
    """What one piece of text adds to a message. Joined over all pieces it is the message, whatever the pieces were."""

    reasoning: str = ""
    content: str = ""
    tool_calls: list[ToolCallDelta] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.reasoning or self.content or self.tool_calls)


class MessageWriter:
    """Gathers what the parsers recognize, and keeps white space that only separates the parts out of them.

    White space around reasoning is dropped, and so is white space before and after tool calls. Other white space stays.

    Args:
        parallel: False: tool calls after the first are dropped.
        new_call_id: makes ids of tool calls.

    Attributes:
        num_calls: tool calls so far, without dropped ones.
    """

    def __init__(self, parallel: bool = True, new_call_id: Callable[[], str] = long_call_id):
        self.num_calls = 0
        self._new_call_id = new_call_id
        self._parallel = parallel
        self._dropping = False
        self._delta = MessageDelta()
        self._space = ""  # at the end of content or of reasoning: what follows decides
        self._has_reasoning = False
        self._strips = False

    def take(self) -> MessageDelta:
        """What was written since the last time."""
        delta, self._delta = self._delta, MessageDelta()
        return delta

    def reasoning(self, text: str) -> None:
        """More reasoning."""
        text = self._space + text if self._has_reasoning else text.lstrip()
        self._has_reasoning = self._has_reasoning or bool(text)
        self._strips = True  # whether or not it is ever ended
        self._delta.reasoning += self._without_space(text)

    def end_reasoning(self) -> None:
        """Content begins."""
        self._space = ""

    def content(self, text: str) -> None:
        """More content."""
        if self._strips:
            text = text.lstrip()
            self._strips = not text
        self._delta.content += self._without_space(self._space + text)

    def call(self, name: str) -> None:
        """A tool call begins."""
        self._space = ""
        self._strips = False
        self._dropping = not self._parallel and self.num_calls > 0
        if not self._dropping:
            self._delta.tool_calls.append(ToolCallDelta(self.num_calls, name, self._new_call_id()))
            self.num_calls += 1

    def arguments(self, text: str) -> None:
        """More of the last call's arguments."""
        if self._dropping or not text:
            return
        if not self._delta.tool_calls:
            self._delta.tool_calls.append(ToolCallDelta(self.num_calls - 1))
        self._delta.tool_calls[-1].arguments += text

    def end(self) -> None:
        """Nothing more comes."""
        if not self.num_calls and not self._strips:
            self._delta.content += self._space
        self._space = ""

    def _without_space(self, text: str) -> str:
        kept = text.rstrip()
        self._space = text[len(kept) :]
        return kept
