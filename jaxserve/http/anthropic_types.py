"""Bodies of Anthropic's /v1/messages: what goes in, as a conversation."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, FailFast, Field

from jaxserve.errors import InvalidRequest
from jaxserve.grammar import Grammar
from jaxserve.http.body import Body, Unsupported
from jaxserve.http.conversation import Conversation, Tool, ToolUse
from jaxserve.http.grammar_fields import JsonSchema
from jaxserve.http.openai_messages import MAX_TOOLS, Name, joined_text, tool_use
from jaxserve.http.openai_types import MAX_MESSAGES
from jaxserve.http.sampler_fields import Ignored, model_defaults
from jaxserve.request import SamplingParams

Text = Annotated[str | None, BeforeValidator(joined_text)]
_CHOICES = {"auto": "auto", "any": "required", "tool": "named", "none": "none"}


class AnthropicMessage(Body):
    """One message; tool results are a user's."""

    role: Literal["user", "assistant", "system"]
    content: str | list[dict[str, Any]]


class AnthropicTool(Body):
    """A function that the model may call; Anthropic's own tools are not there."""

    type: Literal["custom"] | None = None
    name: Name
    description: str | None = None
    input_schema: dict[str, Any]


class AnthropicToolChoice(Body):
    """Whether and which tools are to be used."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Body):
    """Whether the model shall think aloud."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Ignored = None
    display: Ignored = None


class OutputFormat(Body):
    """The format of the answer's text."""

    type: Literal["json_schema"]
    schema_: JsonSchema = Field(alias="schema")


class OutputConfig(Body):
    """How the answer shall be."""

    effort: str | None = Field(None, max_length=64, description="The chat template's variable `reasoning_effort`.")
    format: OutputFormat | None = None


class CountBody(Body):
    """POST /v1/messages/count_tokens, and what POST /v1/messages has beside it."""

    model: str | None = None
    messages: Annotated[list[AnthropicMessage], FailFast()] = Field(min_length=1, max_length=MAX_MESSAGES)
    system: Text = Field(None, description="Text, or a list of {type: text, text}.")
    tools: list[AnthropicTool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: AnthropicToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: Ignored = None

    def conversation(self, params: SamplingParams) -> Conversation:
        """What is asked for. Raises InvalidRequest, naming the field."""
        messages: list[dict[str, Any]] = [{"role": "system", "content": self.system}] if self.system is not None else []
        for place, message in enumerate(self.messages):
            messages += _messages_of(message, f"messages[{place}]")
        goes_on = messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls")
        variables: dict[str, Any] = {"add_generation_prompt": not goes_on, "continue_final_message": goes_on}
        if self.thinking is not None:
            variables["enable_thinking"] = self.thinking.type != "disabled"
        if self.output_config is not None and self.output_config.effort is not None:
            variables["reasoning_effort"] = self.output_config.effort
        return Conversation(messages, params, self._tool_use(), variables)

    def _tool_use(self) -> ToolUse:
        choice = self.tool_choice or AnthropicToolChoice(type="auto")
        tools = [Tool(tool.name, tool.description, tool.input_schema) for tool in self.tools or ()]
        return tool_use(tools, _CHOICES[choice.type], choice.name or "", not choice.disable_parallel_tool_use)


class MessagesBody(CountBody):
    """POST /v1/messages."""

    max_tokens: int
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop_sequences: Annotated[list[str], FailFast()] = Field(default_factory=list)
    stream: bool | None = None
    metadata: Ignored = None
    service_tier: Ignored = None
    inference_geo: Ignored = None
    # Those that nothing here implements.
    container: Unsupported = None
    mcp_servers: Unsupported = None
    context_management: Unsupported = None

    def params(self, defaults: Mapping[str, float]) -> SamplingParams:
        """How to sample.

        Args:
            defaults: of the model's generation_config.json, for absent fields.
        """
        given = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        values: dict[str, Any] = model_defaults(defaults) | {name: value for name, value in given.items() if value is not None}
        wanted = self.output_config.format if self.output_config is not None else None
        grammar = None if wanted is None else Grammar.json_schema(wanted.schema_, "output_config.format.schema")
        return SamplingParams(**values, max_tokens=self.max_tokens, stop=tuple(self.stop_sequences), grammar=grammar)


def _messages_of(message: AnthropicMessage, name: str) -> list[dict[str, Any]]:
    """A message as chat templates take it: its tool results are messages of their own, before its text."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    told: dict[str, Any] = {"role": message.role, "content": None}
    results: list[dict[str, Any]] = []
    texts: list[str] = []
    for place, block in enumerate(message.content):
        where = f"{name}.content[{place}]"
        match block.get("type"):
            case "text":
                texts.append(_string(block, "text", where))
            case "tool_use" if message.role == "assistant":
                arguments = block.get("input")
                if not isinstance(arguments, dict):
                    raise InvalidRequest(f"`{where}.input` must be an object", f"{where}.input")
                function = {"name": _string(block, "name", where), "arguments": arguments}
                told.setdefault("tool_calls", []).append({"id": _string(block, "id", where), "type": "function", "function": function})
            case "tool_result" if message.role == "user":
                content = _result_text(block.get("content"), where)
                results.append({"role": "tool", "tool_call_id": _string(block, "tool_use_id", where), "content": content})
            case "thinking" if message.role == "assistant":
                told["reasoning_content"] = _string(block, "thinking", where)
            case "redacted_thinking" if message.role == "assistant":
                pass
            case kind:
                raise InvalidRequest(f"`{where}`: blocks of type `{str(kind)[:64]}` are not supported in this place", f"{where}.type")
    if texts or not (results or told.get("tool_calls")):
        told["content"] = "\n".join(texts)
    return [*results, told] if told["content"] is not None or told.get("tool_calls") else results


def _result_text(content: Any, where: str) -> str:
    try:
        text = joined_text(content if content is not None else "")
    except ValueError as error:
        raise InvalidRequest(f"`{where}.content` {error}", f"{where}.content") from error
    if not isinstance(text, str):
        raise InvalidRequest(f"`{where}.content` must be a text or a list of blocks", f"{where}.content")
    return text


def _string(block: Mapping[str, Any], field: str, where: str) -> str:
    value = block.get(field)
    if not isinstance(value, str):
        raise InvalidRequest(f"`{where}.{field}` must be a string", f"{where}.{field}")
    return value
