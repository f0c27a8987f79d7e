"""Fields of a request that say how to sample, of any API that has them all: OpenAI's and vLLM's."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, FailFast, Field

from jaxserve.grammar import Grammar
from jaxserve.http.body import Body, Unsupported, only
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
    "temperature", "top_p", "min_p", "typical_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed", "min_tokens",
    "ignore_eos", "logit_bias", "skip_special_tokens", "include_stop_str_in_output",
)  # fmt: skip


class SamplerFields(Body):
    """One sample's."""

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop: Stop = Field(default_factory=list)
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: LogitBias = None
    stream: bool | None = None
    user: Ignored = None
    metadata: Any = Field(None, description="Without effect.")
    service_tier: Ignored = None
    store: bool | None = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None
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
    priority: Annotated[Any, BeforeValidator(_only_zero)] = Field(None, description="Only 0.")
    # SGLang's
    no_stop_trim: bool | None = Field(None, description="As include_stop_str_in_output.")
    # Those of vLLM and SGLang that nothing here implements yet, and that would change the answer.
    allowed_token_ids: Unsupported = None
    bad_words: Unsupported = None
    use_beam_search: Unsupported = None
    logits_processors: Unsupported = None
    custom_logit_processor: Unsupported = None
    detokenize: Annotated[Any, only(True)] = None
    flat_logprobs: Unsupported = None
    input_ids: Unsupported = None
    logprob_token_ids: Unsupported = None
    lora_path: Unsupported = None
    repetition_detection: Unsupported = None
    return_hidden_states: Unsupported = None
    separate_reasoning: Annotated[Any, only(True)] = None
    session_params: Unsupported = None
    stop_regex: Unsupported = None
    thinking_token_budget: Unsupported = None
    truncation_side: Annotated[Any, only("left")] = None
    watermarking: Unsupported = None

    def sampler_params(
        self,
        defaults: Mapping[str, float],
        max_tokens: int | None,
        logprobs: int | None,
        grammar: Grammar | None = None,
        n: int = 1,
        prompt_logprobs: int | None = None,
    ) -> SamplingParams:
        """What is asked for; not yet validated.

        Args:
            defaults: of the model's generation_config.json, for absent fields.
            max_tokens, logprobs, grammar, n, prompt_logprobs: they differ between the APIs.
        """
        values: dict[str, Any] = model_defaults(defaults)
        values |= {name: value for name in _PLAIN if (value := getattr(self, name)) is not None}
        if self.no_stop_trim:
            values["include_stop_str_in_output"] = True
        if self.top_k is not None:
            values["top_k"] = 0 if self.top_k == -1 else self.top_k
        stop, stop_token_ids = tuple(self.stop), tuple(self.stop_token_ids or ())
        return SamplingParams(
            **values,
            n=n,
            stop=stop,
            stop_token_ids=stop_token_ids,
            max_tokens=max_tokens,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            grammar=grammar,
        )


def model_defaults(defaults: Mapping[str, float]) -> dict[str, Any]:
    """Fields of SamplingParams from generation_config.json's numbers."""
    return {name: int(value) if name == "top_k" else value for name, value in defaults.items()}
