"""Bodies of OpenAI's /v1/responses: what goes in, as a conversation."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from jaxserve.errors import InvalidRequest
from jaxserve.grammar import Grammar
from jaxserve.http.body import Body, Unsupported
from jaxserve.http.conversation import Conversation, Tool, ToolUse
from jaxserve.http.grammar_fields import JsonSchema
from jaxserve.http.openai_messages import MAX_TOOLS, Name, joined_text, parsed_arguments, tool_use
from jaxserve.http.sampler_fields import Ignored, SamplerFields
from jaxserve.http.sampling_fields import check_logprobs

MAX_ITEMS = 8192
LOGPROBS = "message.output_text.logprobs"
_ROLES = ("user", "assistant", "system", "developer")


class TextFormat(Body):
    """The format of the answer's text."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    description: str | None = None
    schema_: JsonSchema = Field(default_factory=dict, alias="schema")
    strict: bool | None = None

    def grammar(self) -> Grammar | None:
        """What the text must match; None: anything. Raises InvalidRequest."""
        match self.type:
            case "json_object":
                return Grammar.json_object("text.format")
            case "json_schema":
                return Grammar.json_schema(self.schema_, "text.format.schema")
        return None


class TextOptions(Body):
    """How the answer's text shall be."""

    format: TextFormat = Field(default_factory=TextFormat)
    verbosity: Ignored = None


class ReasoningOptions(Body):
    """How the model shall think."""

    effort: str | None = Field(None, max_length=64, description="A variable of the chat template.")
    summary: Ignored = None
    generate_summary: Ignored = None


class ResponseTool(Body):
    """A function that the model may call; other kinds of tools are not there."""

    type: Literal["function"]
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def as_tool(self) -> Tool:
        """It, in the words of no API."""
        return Tool(self.name, self.description, self.parameters) if self.parameters else Tool(self.name, self.description)


class ResponseToolName(Body):
    """The tool_choice of one function."""

    type: Literal["function"]
    name: Name


def _only_disabled(value: Any) -> Any:
    if value not in (None, "disabled"):
        raise ValueError("other than `disabled` is not supported")
    return value


class ResponsesBody(SamplerFields):
    """POST /v1/responses."""

    input: Any = Field(description="A text, or a list of items: messages, function calls and their outputs, reasoning.")
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    top_logprobs: int | None = None
    include: list[str] | None = None
    tools: list[ResponseTool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: Literal["auto", "none", "required"] | ResponseToolName | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    previous_response_id: str | None = Field(None, max_length=256)
    metadata: dict[str, str] | None = Field(None, max_length=16)
    truncation: Annotated[Any, BeforeValidator(_only_disabled)] = None
    stream_options: Ignored = None
    max_tool_calls: Ignored = None
    # Those that nothing here implements.
    background: Unsupported = None
    conversation: Unsupported = None
    prompt: Unsupported = None

    @field_validator("input")
    @classmethod
    def _some_input(cls, value: Any) -> Any:
        if not isinstance(value, str | list) or not value:
            raise ValueError("must be a text or a list of items; not empty")
        if isinstance(value, list) and len(value) > MAX_ITEMS:
            raise ValueError(f"supports up to {MAX_ITEMS} items. Given: {len(value)}")
        return value

    @property
    def keeps(self) -> bool:
        """Whether the response is to be kept."""
        return self.store is not False

    def new_messages(self) -> list[dict[str, Any]]:
        """The input as chat templates take messages. Raises InvalidRequest, naming the item."""
        if isinstance(self.input, str):
            return [{"role": "user", "content": self.input}]
        return messages_of(self.input)

    def conversation_after(
        self, earlier: Sequence[Mapping[str, Any]], messages: Sequence[Mapping[str, Any]], defaults: Mapping[str, float], most_logprobs: int
    ) -> Conversation:
        """What is asked for.

        Args:
            earlier: messages of the responses before.
            messages: new ones.
            defaults: of the model's generation_config.json.
            most_logprobs: that may be asked for.

        Raises:
            InvalidRequest: naming the field.
        """
        logprobs = None
        if self.top_logprobs or LOGPROBS in (self.include or ()):
            logprobs = check_logprobs("top_logprobs", self.top_logprobs or 0, most_logprobs)
        grammar = self.text.format.grammar() if self.text is not None else None
        instructions = [{"role": "system", "content": self.instructions}] if self.instructions is not None else []
        effort = self.reasoning.effort if self.reasoning is not None else None
        variables = {"add_generation_prompt": True, **({"reasoning_effort": effort} if effort is not None else {})}
        params = self.sampler_params(defaults, self.max_output_tokens, logprobs, grammar)
        return Conversation([*instructions, *earlier, *messages], params, self.tool_use(), variables)

    def tool_use(self) -> ToolUse:
        """Tools and their use; raises InvalidRequest."""
        choice = self.tool_choice or "auto"
        only = choice.name if isinstance(choice, ResponseToolName) else ""
        tools = [tool.as_tool() for tool in self.tools or ()]
        return tool_use(tools, "named" if only else str(choice), only, self.parallel_tool_calls)


def messages_of(items: Sequence[Any]) -> list[dict[str, Any]]:
    """Messages as chat templates take them from the items of an input or an output.

    Reasoning and function calls that follow one another, and an assistant's message, are one message.

    Raises:
        InvalidRequest: naming the item.
    """
    messages: list[dict[str, Any]] = []
    for place, item in enumerate(items):
        name = f"input[{place}]"
        if not isinstance(item, dict):
            raise InvalidRequest(f"`{name}` must be an object", name)
        kind = item.get("type", "message")
        match kind:
            case "message":
                role = item.get("role")
                if role not in _ROLES:
                    raise InvalidRequest(f"`{name}.role` must be one of {', '.join(_ROLES)}", f"{name}.role")
                content = _text(item.get("content"), f"{name}.content")
                if role == "assistant":
                    _answer(messages, "content")["content"] = content
                else:
                    messages.append({"role": role, "content": content})
            case "reasoning":
                parts = item.get("content") or item.get("summary") or []
                if not isinstance(parts, list):
                    raise InvalidRequest(f"`{name}.content` must be a list of parts", f"{name}.content")
                _answer(messages, "reasoning_content")["reasoning_content"] = _text(
                    [{**part, "type": "text"} if isinstance(part, dict) else part for part in parts], f"{name}.content"
                )
            case "function_call":
                function = {field: _string(item, field, name) for field in ("name", "arguments")}
                call = {"id": _string(item, "call_id", name), "type": "function", "function": function}
                function["arguments"] = parsed_arguments(function["arguments"] or "{}")
                _answer(messages, "").setdefault("tool_calls", []).append(call)
            case "function_call_output":
                output = _text(item.get("output"), f"{name}.output")
                messages.append({"role": "tool", "tool_call_id": _string(item, "call_id", name), "content": output})
            case _:
                raise InvalidRequest(f"`{name}`: items of type `{str(kind)[:64]}` are not supported", f"{name}.type")
    return messages


def _answer(messages: list[dict[str, Any]], part: str) -> dict[str, Any]:
    """The assistant's message that a part of an answer belongs to: the last one, unless it has that part or what comes after it."""
    last = messages[-1] if messages else None
    ends = {"content": ("content", "tool_calls"), "reasoning_content": ("reasoning_content", "content", "tool_calls"), "": ()}[part]
    if last is None or last["role"] != "assistant" or any(last.get(name) is not None for name in ends):
        last = {"role": "assistant", "content": None}
        messages.append(last)
    return last


def _text(content: Any, name: str) -> str:
    try:
        text = joined_text(content)
    except ValueError as error:
        raise InvalidRequest(f"`{name}` {error}", name) from error
    if not isinstance(text, str):
        raise InvalidRequest(f"`{name}` must be a text or a list of parts", name)
    return text


def _string(item: Mapping[str, Any], field: str, name: str) -> str:
    value = item.get(field)
    if not isinstance(value, str):
        raise InvalidRequest(f"`{name}.{field}` must be a string", f"{name}.{field}")
    return value
