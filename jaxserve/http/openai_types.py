"""Bodies of OpenAI's chat and text completions, with vLLM's extra fields."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

from pydantic import BeforeValidator, FailFast, Field, field_validator

from jaxserve.errors import InvalidRequest
from jaxserve.http.body import Unsupported, only
from jaxserve.http.conversation import Conversation, ToolUse
from jaxserve.http.openai_messages import MAX_TOOLS, FunctionTool, Message, NamedChoice, tool_use
from jaxserve.http.sampler_fields import Ignored
from jaxserve.http.sampling_fields import SamplingFields, check_logprobs
from jaxserve.request import MAX_SAMPLES, SamplingParams

MAX_MESSAGES = 8192
# Variables of chat templates that a client may set; any other could change what the template was trusted with.
TEMPLATE_VARIABLES = frozenset({"enable_thinking", "thinking", "reasoning_effort", "date_string", "preserve_thinking"})
DEFAULT_COMPLETION_TOKENS = 16


def _known_choice(value: Any) -> Any:
    if isinstance(value, dict) and (kind := value.get("type", "function")) != "function":
        raise ValueError(f"of type `{str(kind)[:64]}` is not supported yet")
    return value


ToolChoice = Annotated[Annotated[str, Field(max_length=256)] | NamedChoice, BeforeValidator(_known_choice)]


class ChatBody(SamplingFields):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], FailFast()] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[FunctionTool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: ToolChoice | None = Field(None, description="auto, none, required, or a function; TGI's clients give its name alone.")
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = Field(None, max_length=64, description="A variable of the chat template.")
    include_reasoning: bool | None = Field(None, description="False: reasoning is not told.")
    echo: bool | None = Field(None, description="Tell the last message too, where the answer goes on with it.")
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = Field(None, description="Add what the tokenizer adds around a text; templates do it mostly.")
    chat_template_kwargs: dict[str, Any] | None = None
    verbosity: Ignored = None
    # Those that nothing here implements yet.
    functions: Unsupported = None
    function_call: Unsupported = None
    modalities: Annotated[Any, only(["text"], [])] = None
    audio: Unsupported = None
    prediction: Unsupported = None
    web_search_options: Unsupported = None
    chat_template: Unsupported = None
    documents: Unsupported = None
    prompt_embeds: Unsupported = None

    @field_validator("chat_template_kwargs")
    @classmethod
    def _known_variables(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        for name, setting in (value or {}).items():
            if name not in TEMPLATE_VARIABLES:
                raise ValueError(
                    f"`{name[:64]}` is not a variable that a request may set; those are {', '.join(sorted(TEMPLATE_VARIABLES))}"
                )
            if setting is not None and not isinstance(setting, str | bool | int | float):
                raise ValueError(f"must set `{name}` to a string, a number or a boolean")
        return value

    def conversation(self, defaults: Mapping[str, float], most_logprobs: int) -> Conversation:
        """What is asked for.

        Args:
            defaults: of the model's generation_config.json.
            most_logprobs: that may be asked for.

        Raises:
            InvalidRequest: naming fields that contradict each other.
        """
        messages = [message.as_template_value() for message in self.messages]
        return Conversation(messages, self.params(defaults, most_logprobs), self.tool_use(), self.template_variables())

    def tool_use(self) -> ToolUse:
        """Tools and their use; raises InvalidRequest."""
        choice = self.tool_choice or "auto"
        name = choice.function.name if isinstance(choice, NamedChoice) else choice
        tools = [tool.function.as_tool() for tool in self.tools or ()]
        if isinstance(choice, NamedChoice) or name not in ("auto", "none", "required"):
            return tool_use(tools, "named", name, self.parallel_tool_calls)
        return tool_use(tools, name, "", self.parallel_tool_calls)

    def template_variables(self) -> dict[str, Any]:
        """Arguments for the chat template. A conversation that ends with the assistant's words is gone on with, as TGI does."""
        last = self.messages[-1]
        ends_with_answer = last.role == "assistant" and not last.tool_calls
        goes_on = (
            self.continue_final_message if self.continue_final_message is not None else ends_with_answer and not self.add_generation_prompt
        )
        starts = self.add_generation_prompt if self.add_generation_prompt is not None else not goes_on
        if goes_on and starts:
            raise InvalidRequest("`continue_final_message` and `add_generation_prompt` exclude each other", "continue_final_message")
        effort = {} if self.reasoning_effort is None else {"reasoning_effort": self.reasoning_effort}
        return {"add_generation_prompt": starts, "continue_final_message": goes_on, **effort, **(self.chat_template_kwargs or {})}

    def params(self, defaults: Mapping[str, float], most_logprobs: int) -> SamplingParams:
        """How to sample; raises InvalidRequest for logprobs that contradict each other."""
        if self.max_tokens is not None and self.max_completion_tokens is not None and self.max_tokens != self.max_completion_tokens:
            raise InvalidRequest("`max_tokens` and `max_completion_tokens` differ", "max_tokens")
        logprobs = None
        if self.logprobs:
            logprobs = check_logprobs("top_logprobs", self.top_logprobs or 0, most_logprobs)
        elif self.top_logprobs:
            raise InvalidRequest("`top_logprobs` needs `logprobs` to be true", "top_logprobs")
        wanted = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        return self.sampling_params(defaults, wanted, logprobs)


Prompt = str | list[int]


def _as_prompts(value: Any) -> list[Prompt]:
    """OpenAI's four kinds of prompt as a list of texts and token id lists."""
    if isinstance(value, str) or (isinstance(value, list) and value and _is_integer(value[0])):
        value = [value]
    if not isinstance(value, list) or not value:
        raise ValueError("must be a string, a list of strings, a list of token ids or a list of those; not empty")
    for prompt in value:
        if isinstance(prompt, str):
            continue
        if not isinstance(prompt, list) or not prompt or not all(map(_is_integer, prompt)):
            raise ValueError("must have strings or lists of token ids as elements, not empty")
        if not 0 <= min(prompt) <= max(prompt) < 2**32:
            raise ValueError("must have token ids of the vocabulary")
    return value


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class CompletionBody(SamplingFields):
    """POST /v1/completions."""

    prompt: Annotated[Any, BeforeValidator(_as_prompts)] = Field(
        description="A string, a list of strings, a list of token ids or a list of those."
    )
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = Field(None, description="Samples that are taken; the `n` with the highest log probability a token are told.")
    add_special_tokens: bool | None = None
    # Those that nothing here implements yet.
    suffix: Unsupported = None
    prompt_embeds: Unsupported = None

    @property
    def picks(self) -> bool:
        """Whether more samples are taken than told."""
        return self.best_of is not None and self.best_of != (self.n or 1)

    @property
    def only_prompt(self) -> bool:
        """Whether nothing but the prompt is to be told: a token is sampled and dropped."""
        return bool(self.echo) and self.max_tokens == 0

    def params(self, defaults: Mapping[str, float], most_logprobs: int) -> SamplingParams:
        """How to sample; raises InvalidRequest for fields that cannot go together."""
        logprobs = None if self.logprobs is None else check_logprobs("logprobs", self.logprobs, most_logprobs)
        wanted = DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens
        if self.only_prompt:
            if self.stream:
                raise InvalidRequest("`max_tokens` of 0 cannot be streamed", "max_tokens")
            wanted = 1
        params = self.sampling_params(defaults, wanted, logprobs)
        if self.echo and self.prompt_logprobs is None:
            params = replace(params, prompt_logprobs=logprobs)
        if not self.picks:
            return params
        best_of = self.best_of or 0
        if not params.n < best_of <= MAX_SAMPLES:
            raise InvalidRequest(f"`best_of` must be >= `n` ({params.n}) and <= {MAX_SAMPLES}. Given: {best_of}", "best_of")
        if self.stream:
            raise InvalidRequest("`best_of` other than `n` cannot be streamed", "best_of")
        return replace(params, n=best_of, logprobs=logprobs or 0)
