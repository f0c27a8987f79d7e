"""Bodies of OpenAI's routes, with vLLM's extra fields, and what they mean as SamplingParams."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, FailFast, Field, field_validator

from jaxserve.errors import InvalidRequest
from jaxserve.http.body import Body, Unsupported
from jaxserve.request import MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS, SamplingParams

MAX_MESSAGES = 8192
# Variables of chat templates that a client may set; any other could change what the template was trusted with.
TEMPLATE_VARIABLES = frozenset({"enable_thinking", "thinking", "reasoning_effort", "date_string", "preserve_thinking"})
DEFAULT_COMPLETION_TOKENS = 16


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else [] if value is None else value


def _as_bias(value: Any) -> Any:
    """OpenAI's {"token id": bias}: JSON's keys are strings."""
    if not isinstance(value, dict):
        return value
    if len(value) > MAX_LOGIT_BIAS:
        raise ValueError(f"supports up to {MAX_LOGIT_BIAS} tokens. Given: {len(value)}")
    try:
        return {int(token): bias for token, bias in value.items()}
    except ValueError:
        raise ValueError("must have token ids as keys") from None


Stop = Annotated[list[str], FailFast(), BeforeValidator(_as_list)]
LogitBias = Annotated[dict[int, float] | None, BeforeValidator(_as_bias)]


class StreamOptions(Body):
    """OpenAI's stream_options."""

    include_usage: bool | None = None


class SamplingFields(Body):
    """Fields that chat and completions share."""

    model: str | None = None
    n: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop: Stop = Field(default_factory=list)
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: LogitBias = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    # vLLM's
    top_k: int | None = Field(None, description="0 and -1 are off.")
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = Field(None, max_length=MAX_STOP_TOKEN_IDS)
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    cache_salt: str | None = Field(None, max_length=256)
    # Those that nothing here implements yet.
    structured_outputs: Unsupported = None
    guided_json: Unsupported = None
    guided_regex: Unsupported = None
    guided_choice: Unsupported = None
    guided_grammar: Unsupported = None
    allowed_token_ids: Unsupported = None
    bad_words: Unsupported = None
    prompt_logprobs: Unsupported = None
    use_beam_search: Unsupported = None
    truncate_prompt_tokens: Unsupported = None
    logits_processors: Unsupported = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a usage event."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def check_stream_options(self) -> None:
        """Raise InvalidRequest for stream options without a stream."""
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("`stream_options` is only allowed with `stream`", "stream_options")

    def sampling_params(self, defaults: Mapping[str, float], max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """What is asked for; not yet validated.

        Args:
            defaults: of the model's generation_config.json, for absent fields.
            max_tokens, logprobs: they differ between chat and completions.
        """
        given = {
            "n": self.n,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": 0 if self.top_k == -1 else self.top_k,
            "min_p": self.min_p,
            "typical_p": self.typical_p,
            "repetition_penalty": self.repetition_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "seed": self.seed,
            "min_tokens": self.min_tokens,
            "stop": tuple(self.stop),
            "stop_token_ids": None if self.stop_token_ids is None else tuple(self.stop_token_ids),
            "ignore_eos": self.ignore_eos,
            "logit_bias": self.logit_bias,
            "skip_special_tokens": self.skip_special_tokens,
            "include_stop_str_in_output": self.include_stop_str_in_output,
        }
        values: dict[str, Any] = {**model_defaults(defaults), **{name: value for name, value in given.items() if value is not None}}
        return SamplingParams(**values, max_tokens=max_tokens, logprobs=logprobs)


def model_defaults(defaults: Mapping[str, float]) -> dict[str, Any]:
    """Fields of SamplingParams from generation_config.json's numbers."""
    return {name: int(value) if name == "top_k" else value for name, value in defaults.items()}


def _joined_text(value: Any) -> Any:
    """The text of content that comes in parts."""
    if not isinstance(value, list):
        return value
    return "\n".join(_part_text(place, part) for place, part in enumerate(value))


def _part_text(place: int, part: Any) -> str:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise ValueError(f"must have an object with a `type` as part {place}")
    if part["type"] != "text":
        raise ValueError(f"has a part of type `{part['type'][:32]}`; only `text` is supported yet")
    if not isinstance(part.get("text"), str):
        raise ValueError(f"must have a string as `text` of part {place}")
    return part["text"]


class Message(Body):
    """One message of a conversation."""

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: Annotated[str | None, BeforeValidator(_joined_text)] = Field(None, description="Text, or a list of {type: text, text}.")
    name: str | None = None
    tool_calls: Unsupported = None
    function_call: Unsupported = None

    def as_template_value(self) -> dict[str, str]:
        """As chat templates expect it."""
        value = {"role": self.role, "content": self.content or ""}
        return value | {"name": self.name} if self.name is not None else value


def _only(*allowed: Any) -> BeforeValidator:
    """Refuse all values but those that ask for nothing special."""

    def check(value: Any) -> Any:
        if value is not None and value not in allowed:
            raise ValueError(f"other than {allowed[0]} is not supported yet")

    return BeforeValidator(check)


class ChatBody(SamplingFields):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], FailFast()] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    # Those that nothing here implements yet.
    tools: Unsupported = None
    tool_choice: Annotated[Any, _only("none", "auto")] = None
    functions: Unsupported = None
    function_call: Unsupported = None
    response_format: Annotated[Any, _only({"type": "text"}, {})] = None
    modalities: Annotated[Any, _only(["text"], [])] = None
    audio: Unsupported = None
    prediction: Unsupported = None
    web_search_options: Unsupported = None
    echo: Unsupported = None
    chat_template: Unsupported = None
    documents: Unsupported = None

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

    def template_variables(self) -> dict[str, Any]:
        """Arguments for the chat template. A conversation that ends with the assistant's words is gone on with, as TGI does."""
        ends_with_answer = self.messages[-1].role == "assistant"
        goes_on = (
            self.continue_final_message if self.continue_final_message is not None else ends_with_answer and not self.add_generation_prompt
        )
        starts = self.add_generation_prompt if self.add_generation_prompt is not None else not goes_on
        if goes_on and starts:
            raise InvalidRequest("`continue_final_message` and `add_generation_prompt` exclude each other", "continue_final_message")
        return {"add_generation_prompt": starts, "continue_final_message": goes_on, **(self.chat_template_kwargs or {})}

    def params(self, defaults: Mapping[str, float], most_logprobs: int) -> SamplingParams:
        """What is asked for; raises InvalidRequest for logprobs that contradict each other."""
        if self.max_tokens is not None and self.max_completion_tokens is not None and self.max_tokens != self.max_completion_tokens:
            raise InvalidRequest("`max_tokens` and `max_completion_tokens` differ", "max_tokens")
        logprobs = None
        if self.logprobs:
            logprobs = check_logprobs("top_logprobs", self.top_logprobs or 0, most_logprobs)
        elif self.top_logprobs:
            raise InvalidRequest("`top_logprobs` needs `logprobs` to be true", "top_logprobs")
        wanted = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        return self.sampling_params(defaults, wanted, logprobs)


def check_logprobs(name: str, value: int, most: int) -> int:
    """The value, or InvalidRequest where it is out of bounds."""
    if not 0 <= value <= most:
        raise InvalidRequest(f"`{name}` must be >= 0 and <= {most}. Given: {value}", name)
    return value


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
    best_of: int | None = None
    add_special_tokens: bool | None = None
    # Those that nothing here implements yet.
    suffix: Unsupported = None
    prompt_embeds: Unsupported = None
    response_format: Annotated[Any, _only({"type": "text"}, {})] = None

    def params(self, defaults: Mapping[str, float], most_logprobs: int) -> SamplingParams:
        """What is asked for; raises InvalidRequest for fields that cannot go together."""
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise InvalidRequest("`best_of` other than `n` is not supported", "best_of")
        if self.echo and self.logprobs is not None:
            raise InvalidRequest("`logprobs` of the prompt (`echo`) are not supported yet", "logprobs")
        logprobs = None if self.logprobs is None else check_logprobs("logprobs", self.logprobs, most_logprobs)
        wanted = DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens
        return self.sampling_params(defaults, wanted, logprobs)
