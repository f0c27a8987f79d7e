"""What a model writes as an answer, taken apart: reasoning, content and tool calls, however the text is cut into pieces."""

from jaxserve.chat_output.constrained import constrained_answer
from jaxserve.chat_output.formats import (
    REASONING_PARSERS,
    TOOL_CALL_PARSERS,
    ToolFormat,
    choose_reasoning_parser,
    choose_tool_format,
    reasoning_state,
    takes_tools,
)
from jaxserve.chat_output.message import MessageDelta, ToolCallDelta
from jaxserve.chat_output.parser import MessageParser
from jaxserve.chat_output.tool_grammar import answer_or_calls, tool_grammar

__all__ = [
    "REASONING_PARSERS",
    "TOOL_CALL_PARSERS",
    "MessageDelta",
    "MessageParser",
    "ToolCallDelta",
    "ToolFormat",
    "answer_or_calls",
    "choose_reasoning_parser",
    "choose_tool_format",
    "constrained_answer",
    "reasoning_state",
    "takes_tools",
    "tool_grammar",
]
