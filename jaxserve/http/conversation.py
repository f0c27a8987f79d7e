"""A conversation to go on with, in the words of no API: messages as chat templates take them, tools, and how to sample."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jaxserve.chat_output import (
    REASONING_PARSERS,
    TOOL_CALL_PARSERS,
    MessageParser,
    ToolFormat,
    answer_or_calls,
    choose_reasoning_parser,
    choose_tool_format,
    constrained_answer,
    reasoning_state,
    takes_tools,
    tool_grammar,
)
from jaxserve.errors import InvalidRequest, StartupError
from jaxserve.grammar import Grammar
from jaxserve.http.tool_messages import with_tools_told
from jaxserve.request import SamplingParams
from jaxserve.tokenizer import Tokenizer

# Any template is shown these; others (ipython, observation, ...) only where it names them: it would write any word as a role.
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
# Templates that write something else for an assistant's message without content than for an empty one.
_TELLS_NO_CONTENT = re.compile(r"content['\"]?\]? is (?:not )?none")


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call.

    Attributes:
        parameters: JSON schema of its arguments, an object's.
    """

    name: str
    description: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"type": "object", "properties": {}})

    def as_template_value(self) -> dict[str, Any]:
        """As chat templates expect it: OpenAI's shape."""
        described = {"description": self.description} if self.description is not None else {}
        return {"type": "function", "function": {"name": self.name, **described, "parameters": dict(self.parameters)}}


@dataclass(frozen=True, slots=True)
class ToolUse:
    """Which tools there are, and how they are to be used.

    Attributes:
        required: the answer must be calls.
        only: name of the one function that may be called; "" for any.
        parallel: there may be several calls.
    """

    tools: Sequence[Tool] = ()
    required: bool = False
    only: str = ""
    parallel: bool = True

    @property
    def callable_tools(self) -> list[Tool]:
        """Those that may be called."""
        return [tool for tool in self.tools if self.only in ("", tool.name)]


@dataclass(frozen=True, slots=True)
class Conversation:
    """What an answer is wanted for.

    Attributes:
        messages: as chat templates take them.
        params: their grammar is that of the content.
        tools: no tools, no calls.
        variables: of the chat template, add_generation_prompt and continue_final_message among them.
    """

    messages: Sequence[Mapping[str, Any]]
    params: SamplingParams
    tools: ToolUse = field(default_factory=ToolUse)
    variables: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """How an answer to a conversation is to be read.

    Attributes:
        tool_format: None where no calls are looked for.
        names: of the functions that may be called.
        reasoning, parallel, alone: see MessageParser.
    """

    tool_format: ToolFormat | None
    names: frozenset[str]
    reasoning: str
    parallel: bool
    alone: bool = False

    @property
    def plain(self) -> bool:
        """Whether all of the text is content."""
        return self.tool_format is None and not self.reasoning

    def new_parser(self) -> MessageParser:
        """For one answer."""
        return MessageParser(self.tool_format, self.names, self.reasoning, self.parallel, self.alone)


class ChatFormat:
    """How a model is asked and how it answers.

    Args:
        tokenizer: the model's.
        tool_call_parser, reasoning_parser: "auto": by the chat template; "none"; or a name.

    Raises:
        StartupError: there is no parser of that name.
    """

    def __init__(self, tokenizer: Tokenizer, tool_call_parser: str = "auto", reasoning_parser: str = "auto"):
        self._tokenizer = tokenizer
        template = tokenizer.chat_template(with_tools=True)
        self._takes_tools = takes_tools(template)
        self._tells_no_content = _TELLS_NO_CONTENT.search(template) is not None
        self._template = template
        if tool_call_parser not in ("auto", "none", *TOOL_CALL_PARSERS):
            raise StartupError(f"--tool-call-parser: there is no parser named {tool_call_parser}")
        if reasoning_parser not in ("auto", "none", *REASONING_PARSERS):
            raise StartupError(f"--reasoning-parser: there is no parser named {reasoning_parser}")
        self.tool_format = choose_tool_format(template) if tool_call_parser == "auto" else TOOL_CALL_PARSERS.get(tool_call_parser)
        chosen = choose_reasoning_parser(template) if reasoning_parser == "auto" else reasoning_parser
        self.reasoning_parser = None if chosen == "none" else chosen

    def render(self, conversation: Conversation, limit: int | None = None) -> tuple[str, list[int]]:
        """Text and token ids of the prompt.

        Args:
            limit: most token ids; None: any number.

        Raises:
            ContextTooLong: there are more.
            InvalidRequest: the template refuses the conversation, a role is unknown, or tools are there for a model whose format is not
                known.
        """
        tools = [tool.as_template_value() for tool in conversation.tools.tools]
        if tools and self.tool_format is None:
            raise InvalidRequest("it is not known how this model writes tool calls; name a format with --tool-call-parser", "tools")
        messages = [self._as_template_takes_it(message) for message in conversation.messages]
        if not self._takes_tools:
            messages, tools = with_tools_told(messages, tools), []
        return self._tokenizer.apply_chat_template(messages, tools or None, limit=limit, **conversation.variables)

    def answer_format(self, conversation: Conversation, prompt: str) -> tuple[AnswerFormat, SamplingParams]:
        """How to read the answer, and the parameters of the request: what the format demands is added to the conversation's.

        Args:
            prompt: as rendered.

        Raises:
            InvalidRequest: grammar and required calls exclude each other, or the schema of a function's arguments is none.
        """
        use, params = conversation.tools, conversation.params
        tool_format = self.tool_format if use.tools else None
        state = reasoning_state(self.reasoning_parser, prompt)
        if tool_format is not None and use.required and params.grammar is not None:
            raise InvalidRequest(f"`{params.grammar.param}` and a required tool call exclude each other", params.grammar.param)
        grammar, alone = params.grammar, False
        if tool_format is not None:
            marker_id = self._tokenizer.special_token_id(tool_format.marker)
            if marker_id is not None:
                params = replace(params, skip_special_tokens=False)
            how = (tool_format, [(tool.name, tool.parameters) for tool in use.callable_tools], use.parallel, marker_id, state)
            if use.required:
                grammar = Grammar.ebnf(tool_grammar(*how), "tools")
            elif grammar is not None:
                grammar = answer_or_calls(grammar, *how)
                alone = grammar is not None
        elif grammar is not None:
            grammar = constrained_answer(grammar, state)
        if grammar is None and params.grammar is not None:  # it says itself what reasoning and calls there are
            state, grammar = "", params.grammar
        params = replace(params, grammar=grammar)
        names = frozenset(tool.name for tool in use.callable_tools)
        return AnswerFormat(tool_format, names, state, use.parallel, alone), params

    def _as_template_takes_it(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        role = message["role"]
        if role not in ROLES and not re.search(rf"\b{re.escape(role)}\b", self._template):
            raise InvalidRequest(
                f"`role` must be one of {', '.join(ROLES)}, or one that the model's template names. Given: {role}", "messages"
            )
        if role == "developer" and role not in self._template:
            message = {**message, "role": "system"}
        if message.get("content") is None and not self._tells_no_content:
            message = {**message, "content": ""}
        return message
