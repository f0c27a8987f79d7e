"""Messages and tools as OpenAI's chat requests write them."""

import json
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BeforeValidator, Field

from jaxserve.errors import InvalidRequest
from jaxserve.http.body import Body, Unsupported
from jaxserve.http.conversation import Tool, ToolUse

MAX_TOOLS = 512
MAX_TOOL_CALLS = 1024
Name = Annotated[str, Field(min_length=1, max_length=256)]


def joined_text(value: Any) -> Any:
    """The text of content that comes in parts."""
    if not isinstance(value, list):
        return value
    return "\n".join(_part_text(place, part) for place, part in enumerate(value))


def _part_text(place: int, part: Any) -> str:
    if not isinstance(part, dict) or not isinstance(kind := part.get("type"), str):
        raise ValueError(f"must have an object with a `type` as part {place}")
    if kind not in ("text", "refusal", "input_text", "output_text"):
        raise ValueError(f"has a part of type `{kind[:32]}`; only `text` is supported yet")
    text = part.get("refusal" if kind == "refusal" else "text")
    if not isinstance(text, str):
        raise ValueError(f"must have a string as `text` of part {place}")
    return text


def parsed_arguments(text: str) -> Any:
    """A call's arguments as chat templates take them: an object, or the text itself where it is none."""
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return arguments if isinstance(arguments, dict) else text


class CalledFunction(Body):
    """What a tool call of an earlier answer called."""

    name: Name
    arguments: str | dict[str, Any] = ""


class ToolCall(Body):
    """A tool call of an earlier answer."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction

    def as_template_value(self) -> dict[str, Any]:
        """As chat templates expect it: with arguments as an object."""
        arguments = self.function.arguments
        parsed = parsed_arguments(arguments or "{}") if isinstance(arguments, str) else arguments
        value: dict[str, Any] = {"type": "function", "function": {"name": self.function.name, "arguments": parsed}}
        return value if self.id is None else {"id": self.id, **value}


class Message(Body):
    """One message of a conversation."""

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: Annotated[str | None, BeforeValidator(joined_text)] = Field(None, description="Text, or a list of {type: text, text}.")
    name: str | None = None
    tool_calls: list[ToolCall] | None = Field(None, max_length=MAX_TOOL_CALLS)
    tool_call_id: str | None = None
    reasoning_content: str | None = Field(None, description="The reasoning of an earlier answer; templates mostly leave it out.")
    function_call: Unsupported = None

    def as_template_value(self) -> dict[str, Any]:
        """As chat templates expect it; content is None only beside tool calls."""
        value: dict[str, Any] = {"role": self.role, "content": self.content if self.content is not None or self.tool_calls else ""}
        value |= {name: given for name in ("name", "tool_call_id", "reasoning_content") if (given := getattr(self, name)) is not None}
        if self.tool_calls:
            value["tool_calls"] = [call.as_template_value() for call in self.tool_calls]
        return value


class Function(Body):
    """A function that the model may call. `strict` is held to where a call is required; it changes nothing else.

    TGI's own name of `parameters` is `arguments`, and its clients may use it.
    """

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, validation_alias=AliasChoices("parameters", "arguments"))
    strict: bool | None = None

    def as_tool(self) -> Tool:
        """It, in the words of no API."""
        return Tool(self.name, self.description, self.parameters) if self.parameters else Tool(self.name, self.description)


class FunctionTool(Body):
    """OpenAI's tool; functions are the only kind here."""

    type: Literal["function"]
    function: Function


class FunctionName(Body):
    """The name of a function."""

    name: Name


class NamedChoice(Body):
    """The tool_choice of one function."""

    type: Literal["function"] = "function"
    function: FunctionName


def tool_use(tools: list[Tool], choice: str, only: str, parallel: bool | None) -> ToolUse:
    """Tools and their use.

    Args:
        choice: "auto", "none", "required"; "named": `only` says which.

    Raises:
        InvalidRequest: naming the field.
    """
    if choice in ("required", "named") and not tools:
        raise InvalidRequest("`tool_choice` needs `tools`", "tool_choice")
    if choice == "named" and only not in [tool.name for tool in tools]:
        raise InvalidRequest(f"`tool_choice` names `{only[:64]}`, which is none of `tools`", "tool_choice")
    if choice == "none":
        return ToolUse()
    return ToolUse(tools, choice in ("required", "named"), only if choice == "named" else "", parallel is not False and choice != "named")
