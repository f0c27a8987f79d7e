"""The plain types that both halves speak: what is asked for and what comes out, one step at a time.

Frozen or slotted, no JAX, no HTTP. `Request` goes in (http -> engine), `TokenOutput` comes out (engine -> http).
"""

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from jaxserve.errors import ContextTooLong, InvalidRequest
from jaxserve.grammar import Grammar

if TYPE_CHECKING:  # importing it takes half of what `jaxserve --version` may take
    import numpy as np

MAX_TOP_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_STOP_TOKEN_IDS = 64
MAX_STOP_LENGTH = 1024
MAX_SAMPLES = 128
STEP_TIME_BOUNDS = tuple(2e-5 * 1.5**k for k in range(34))  # seconds: 20 us to 13 s


class FinishReason(enum.Enum):
    """Why a sample ended."""

    EOS = "eos"  # an end-of-sequence token of the model
    STOP = "stop"  # a stop string or a stop token id of the request
    LENGTH = "length"  # max_tokens or the context is used up
    ABORT = "abort"  # the client went away
    ERROR = "error"  # the step failed; TokenOutput.error says why
    INVALID = "invalid"  # its grammar cannot be compiled or followed, the client's fault; TokenOutput.error says why


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen and when a sample ends.

    Attributes:
        n: samples of one prompt; they share its pages.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_k: keep the k most likely tokens; 0 is off.
        top_p: keep the smallest set of tokens with this probability mass; 1 is off.
        min_p: drop tokens less likely than this share of the most likely one; 0 is off.
        typical_p: locally typical sampling (Meister et al. 2022, arXiv 2202.00666); 1 is off.
        repetition_penalty: CTRL's penalty (arXiv 1909.05858) over prompt and output tokens; 1 is off.
        presence_penalty, frequency_penalty: OpenAI's, over output tokens; 0 is off.
        seed: any integer; the same seed gives the same tokens whatever else is in the batch. None draws one.
        max_tokens: most output tokens; None means as many as the context holds.
        min_tokens: end-of-sequence and stop tokens are forbidden before this many output tokens.
        stop: strings that end a sample; matched on text, by the process that detokenizes.
        stop_token_ids: token ids that end a sample.
        ignore_eos: the model's end-of-sequence tokens do not end a sample.
        logprobs: None for none, else the number of most likely tokens to report beside the chosen one.
        prompt_logprobs: the same for the prompt's tokens, told once; such a prompt is computed as a whole, whatever is cached of it.
        logit_bias: token id -> value added to its logit.
        watermark_gamma, watermark_delta: share of the vocabulary that each token makes green for the next one, and what is added to the
            logits of those (Kirchenbauer et al. 2023, arXiv 2301.10226; `jaxserve.watermark` detects it); a delta of 0 is off.
        grammar: what the text must match; None is anything. A sample whose grammar is complete and cannot go on ends, whatever
            min_tokens and ignore_eos say.
        skip_special_tokens: special tokens yield no text.
        include_stop_str_in_output: the matched stop string stays in the text.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    watermark_gamma: float = 0.0
    watermark_delta: float = 0.0
    grammar: Grammar | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def validate(self, vocab_size: int) -> None:
        """Check every value.

        Args:
            vocab_size: token ids must be below it.

        Raises:
            InvalidRequest: naming the first field that is out of bounds.
        """
        _integer("n", self.n, 1, MAX_SAMPLES)
        _number("temperature", self.temperature, 0.0, 1e4)
        _integer("top_k", self.top_k, 0, 2**31 - 1)
        _number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("typical_p", self.typical_p, 0.0, 1.0, open_low=True)
        _number("repetition_penalty", self.repetition_penalty, 0.0, 1e4, open_low=True)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if self.seed is not None:
            _integer("seed", self.seed, -(2**63), 2**64 - 1)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _integer("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest(f"`min_tokens` must be <= `max_tokens` ({self.max_tokens}). Given: {self.min_tokens}", "min_tokens")
        if self.logprobs is not None:
            _integer("logprobs", self.logprobs, 0, MAX_TOP_LOGPROBS)
        if self.prompt_logprobs is not None:
            _integer("prompt_logprobs", self.prompt_logprobs, 0, MAX_TOP_LOGPROBS)
        if any(not s for s in self.stop):
            raise InvalidRequest("`stop` must not hold empty strings", "stop")
        if any(len(s) > MAX_STOP_LENGTH for s in self.stop):
            raise InvalidRequest(f"`stop` supports strings of up to {MAX_STOP_LENGTH} characters", "stop")
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise InvalidRequest(
                f"`stop_token_ids` supports up to {MAX_STOP_TOKEN_IDS} token ids. Given: {len(self.stop_token_ids)}", "stop_token_ids"
            )
        for token in self.stop_token_ids:
            _integer("stop_token_ids", token, 0, vocab_size - 1)
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise InvalidRequest(f"`logit_bias` supports up to {MAX_LOGIT_BIAS} tokens. Given: {len(self.logit_bias)}", "logit_bias")
        for token, bias in self.logit_bias.items():
            _integer("logit_bias", token, 0, vocab_size - 1)
            _number("logit_bias", bias, -100.0, 100.0)
        _number("watermark_gamma", self.watermark_gamma, 0.0, 1.0)
        _number("watermark_delta", self.watermark_delta, 0.0, 100.0)
        if self.grammar is not None:
            self.grammar.validate()

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0

    @property
    def penalized(self) -> bool:
        """Whether the sampler needs counts of the tokens so far."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


def _number(name: str, value: float, low: float, high: float, open_low: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InvalidRequest(f"`{name}` must be a finite number", name)
    if value < low or value > high or (open_low and value == low):
        raise InvalidRequest(f"`{name}` must be {'>' if open_low else '>='} {low:g} and <= {high:g}. Given: {value:g}", name)


def _integer(name: str, value: int, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(f"`{name}` must be an integer", name)
    if value < low or value > high:
        raise InvalidRequest(f"`{name}` must be >= {low} and <= {high}. Given: {value}", name)


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to be continued, as it crosses from the front end to the engine.

    Attributes:
        request_id: unique among the running requests of an engine.
        prompt_token_ids: at least one token id, each below the vocabulary's size.
        params: how to continue it.
        cache_salt: prefix-cache entries are shared only among requests of one salt.
        adapter: LoRA adapter name, "" for the base model.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    cache_salt: str = ""
    adapter: str = ""

    def validate(self, info: "EngineInfo") -> None:
        """Check that an engine can serve this request; front end and engine both do.

        Raises:
            ContextTooLong: prompt and max_tokens exceed the engine's limits.
            InvalidRequest: for any other value out of bounds, naming the field.
        """
        prompt = self.prompt_token_ids
        if not prompt:
            raise InvalidRequest("the prompt must hold at least one token", "prompt")
        if min(prompt) < 0 or max(prompt) >= info.vocab_size:
            raise InvalidRequest(f"prompt token ids must be >= 0 and < {info.vocab_size}", "prompt")
        if len(prompt) > info.max_input_tokens:
            raise ContextTooLong(f"the prompt has {len(prompt)} tokens, more than the {info.max_input_tokens} allowed", "prompt")
        self.params.validate(info.vocab_size)
        if (grammar := self.params.grammar) is not None and info.no_grammars:
            raise InvalidRequest(f"grammar is not supported: {info.no_grammars}", grammar.param)
        wanted = len(prompt) + (self.params.max_tokens or 1)
        if wanted > info.max_total_tokens:
            raise ContextTooLong(
                f"prompt ({len(prompt)} tokens) and `max_tokens` ({self.params.max_tokens or 1}) exceed the {info.max_total_tokens} tokens "
                "that prompt and output may have together",
                "max_tokens",
            )


@dataclass(slots=True)
class TokenLogprobs:
    """Log probabilities (nats) at one output position.

    Attributes:
        raw: of the chosen token before penalties, temperature and truncation (OpenAI's, vLLM's).
        processed: of the chosen token in the distribution that was sampled (TGI's).
        top_token_ids: the most likely tokens by `raw`, best first, as many as asked for.
        top_raw, top_processed: their log probabilities; -inf for a token that truncation removed.
    """

    raw: float
    processed: float
    top_token_ids: list[int]
    top_raw: list[float]
    top_processed: list[float]


@dataclass(slots=True, eq=False)
class PromptLogprobs:
    """Log probabilities (nats) of a prompt's tokens, each given those before it. The first has none: P tokens make P - 1 entries.

    Attributes:
        raw: float32 [P - 1], of the prompt's own tokens, as TokenLogprobs.raw.
        ranks: int32 [P - 1], 1 where the prompt's token was the most likely one.
        top_token_ids: int32 [P - 1, N], the most likely tokens, best first, as many as asked for.
        top_raw: float32 [P - 1, N].
    """

    raw: "np.ndarray"
    ranks: "np.ndarray"
    top_token_ids: "np.ndarray"
    top_raw: "np.ndarray"


@dataclass(slots=True)
class TokenOutput:
    """What one step yields for one sample.

    Attributes:
        request_id: the request.
        index: which of its n samples.
        token_ids: new tokens, in order (one, or more with speculation; none when only the finish is told).
        logprobs: one entry a token where the request asked for them, else empty.
        finish_reason: None while the sample goes on.
        num_cached_tokens: prompt tokens taken from the prefix cache.
        queue_time: seconds between arrival and the first scheduling.
        error: what went wrong, with FinishReason.ERROR and INVALID.
        prompt_logprobs: where the request asked for them, with the first tokens of sample 0.
    """

    request_id: str
    index: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs]
    finish_reason: FinishReason | None = None
    num_cached_tokens: int = 0
    queue_time: float = 0.0
    error: str = ""
    prompt_logprobs: PromptLogprobs | None = None


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What a front end must know of an engine.

    Attributes:
        model_id: as given by the user.
        revision: commit or branch, "" if none.
        model_path: local folder or .gguf file: where the tokenizer is.
        vocab_size: token ids are below it.
        max_total_tokens: most prompt plus output tokens of a request.
        max_input_tokens: most prompt tokens of a request.
        eos_token_ids: end-of-sequence tokens of generation_config.json or config.json.
        page_size: tokens a KV page.
        num_pages: pages of the first KV group.
        mesh: "1x1".
        dtype: of activations, and of weights that are not quantized, "float32".
        device: for people, "cpu" or "NVIDIA H200".
        defaults: sampling defaults of generation_config.json (only the fields present), e.g. {"temperature": 0.6}.
        no_grammars: why SamplingParams.grammar is refused, "" where it is not.
        deterministic: a request gets the same tokens to the bit, whatever else runs.
        kv_cache_dtype: of the KV cache, as --kv-cache-dtype calls it, or JAX: "fp8_e4m3fn", "bfloat16".
        quantization: of the weights, for people: "fp8", "gguf (Q4_1, Q8_0)"; "" if none.
        weight_bytes: of all weights, over the devices of a replica.
        windows: of each KV group, in tokens; 0 for all positions.
    """

    model_id: str
    revision: str
    model_path: str
    vocab_size: int
    max_total_tokens: int
    max_input_tokens: int
    eos_token_ids: tuple[int, ...]
    page_size: int
    num_pages: int
    mesh: str
    dtype: str
    device: str
    defaults: Mapping[str, float]
    no_grammars: str = ""
    deterministic: bool = False
    kv_cache_dtype: str = ""
    quantization: str = ""
    weight_bytes: int = 0
    windows: tuple[int, ...] = (0,)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot of an engine's counters and gauges, told on request.

    Counters only grow. Seconds are floats; tokens and pages are ints. Of a step's parts the seconds are summed, and its counts say how
    many took up to each of STEP_TIME_BOUNDS and more than the one before; the last entry is for all above them. Empty: none yet.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_pages_used: int = 0  # held by requests, not merely cached
    num_pages: int = 0
    prefix_queries: int = 0  # prompt tokens looked up
    prefix_hits: int = 0  # of those, tokens found
    num_preemptions: int = 0
    prompt_tokens: int = 0  # computed or cached, of requests that were scheduled
    output_tokens: int = 0
    num_steps: int = 0
    padded_tokens: int = 0  # computed in vain because of bucket sizes
    useful_tokens: int = 0
    compile_events: int = 0  # after ready; must stay 0
    schedule_seconds: float = 0.0  # on the host
    dispatch_seconds: float = 0.0  # on the host
    device_seconds: float = 0.0  # from dispatch, or from the end of the step before, until the tokens were on the host
    collect_seconds: float = 0.0  # on the host, waiting for the tokens
    schedule_counts: tuple[int, ...] = ()
    dispatch_counts: tuple[int, ...] = ()
    device_counts: tuple[int, ...] = ()
    collect_counts: tuple[int, ...] = ()
