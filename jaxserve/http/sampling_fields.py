"""Fields of a request that say how to sample: OpenAI's and vLLM's, shared by chat and text completions and by batch files."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, FailFast, Field

from jaxserve.errors import InvalidRequest
from jaxserve.http.body import Body, Unsupported
from jaxserve.http.grammar_fields import GrammarFields
from jaxserve.request import MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS, SamplingParams


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


def _only_zero(value: Any) -> Any:
    if value not in (None, 0):
        raise ValueError("other than 0 is not supported: requests are served in the order in which they come")
    return None


Stop = Annotated[list[str], FailFast(), BeforeValidator(_as_list)]
LogitBias = Annotated[dict[int, float] | None, BeforeValidator(_as_bias)]
# Accepted, and without any effect here.
Ignored = Annotated[Any, Field(description="Accepted without effect.")]

# Fields that are SamplingParams' of the same name.
_PLAIN = (
    "n", "temperature", "top_p", "min_p", "typical_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed", "min_tokens",
    "ignore_eos", "logit_bias", "skip_special_tokens", "include_stop_str_in_output",
)  # fmt: skip


class StreamOptions(Body):
    """OpenAI's stream_options, and vLLM's continuous_usage_stats."""

    include_usage: bool | None = Field(None, description="The stream ends with an event that tells the usage.")
    continuous_usage_stats: bool | None = Field(None, description="With include_usage: every event tells the usage so far.")
    include_obfuscation: Ignored = None


class SamplingFields(GrammarFields):
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
    user: Ignored = None
    metadata: Ignored = None
    service_tier: Ignored = None
    store: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
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
    cache_salt: str | None = Field(None, max_length=256, description="Cached prefixes are shared among requests of one salt only.")
    truncate_prompt_tokens: int | None = Field(
        None, ge=-1, description="Keep this many tokens of the prompt's end; -1: as many as are allowed."
    )
    return_token_ids: bool | None = Field(None, description="Tell the token ids of prompt and output too.")
    return_tokens_as_token_ids: bool | None = Field(None, description='Tokens in logprobs are "token_id:ID".')
    priority: Annotated[Any, BeforeValidator(_only_zero)] = Field(None, description="Only 0.")
    # Those that nothing here implements yet.
    allowed_token_ids: Unsupported = None
    bad_words: Unsupported = None
    prompt_logprobs: Unsupported = None
    use_beam_search: Unsupported = None
    logits_processors: Unsupported = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a usage event."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """Whether every event of a stream tells the usage so far."""
        return self.include_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)

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
        values: dict[str, Any] = model_defaults(defaults)
        values |= {name: value for name in _PLAIN if (value := getattr(self, name)) is not None}
        if self.top_k is not None:
            values["top_k"] = 0 if self.top_k == -1 else self.top_k
        stop_token_ids = tuple(self.stop_token_ids or ())
        return SamplingParams(
            **values, stop=tuple(self.stop), stop_token_ids=stop_token_ids, max_tokens=max_tokens, logprobs=logprobs, grammar=self.grammar()
        )

    def truncated(self, token_ids: list[int], most: int) -> list[int]:
        """The end of a prompt, as `truncate_prompt_tokens` asks for it.

        Args:
            most: prompt tokens that are allowed.

        Raises:
            InvalidRequest: it asks for more than that.
        """
        kept = self.truncate_prompt_tokens
        if kept is None:
            return token_ids
        if kept > most:
            raise InvalidRequest(f"`truncate_prompt_tokens` must be <= {most}. Given: {kept}", "truncate_prompt_tokens")
        return token_ids[-(most if kept == -1 else kept) :] if kept else []


def model_defaults(defaults: Mapping[str, float]) -> dict[str, Any]:
    """Fields of SamplingParams from generation_config.json's numbers."""
    return {name: int(value) if name == "top_k" else value for name, value in defaults.items()}


def check_logprobs(name: str, value: int, most: int) -> int:
    """The value, or InvalidRequest where it is out of bounds."""
    if not 0 <= value <= most:
        raise InvalidRequest(f"`{name}` must be >= 0 and <= {most}. Given: {value}", name)
    return value
