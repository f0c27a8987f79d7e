"""Bodies of TGI's routes, and what they mean as SamplingParams, with TGI's messages where a value is refused."""

import json
import random
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import FailFast, Field

from jaxserve.config import ServerOptions
from jaxserve.errors import ContextTooLong, InvalidRequest
from jaxserve.grammar import Grammar
from jaxserve.http.body import Body
from jaxserve.request import EngineInfo, SamplingParams

# TGI computes long answers in pieces of this many tokens and holds only the first against the context.
CHECKED_NEW_TOKENS = 1024


class GrammarField(Body):
    """TGI's `grammar`: what the answer must match."""

    type: Literal["json", "json_object", "json_schema", "regex"]
    value: Any = Field(None, description="A JSON schema or its text; {name, schema} for json_schema; a regular expression for regex.")

    def grammar(self, strict: bool) -> Grammar:
        """What it means.

        Args:
            strict: refuse what TGI refuses: a schema without `properties`.

        Raises:
            InvalidRequest: it is none, with TGI's message.
        """
        value = self.value
        try:
            if self.type == "regex":
                if not isinstance(value, str):
                    raise InvalidRequest("the value of a regex must be a string")
                return Grammar.regex(value, "grammar")
            if self.type == "json_schema":
                if not isinstance(value, dict) or "schema" not in value:
                    raise InvalidRequest("the value of a json_schema must have a `schema`")
                value = value["schema"]
            if value is None and not strict:
                return Grammar.json_object("grammar")
            if not isinstance(value, dict | str | bool):
                raise InvalidRequest("the value must be a JSON schema")
            made = Grammar.json_schema(value, "grammar")
            if strict and not (isinstance(schema := json.loads(made.text), dict) and "properties" in schema):
                raise InvalidRequest("Grammar must have a 'properties' field")
        except InvalidRequest as error:
            raise InvalidRequest(f"grammar is not valid: {error}", "grammar") from error
        return made


class GenerateParameters(Body):
    """TGI's `parameters`."""

    best_of: int | None = None
    temperature: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    typical_p: float | None = None
    do_sample: bool = False
    max_new_tokens: int | None = None
    return_full_text: bool | None = None
    stop: Annotated[list[str], FailFast()] = Field(default_factory=list)
    truncate: int | None = None
    watermark: bool = False
    details: bool = False
    decoder_input_details: bool = False
    seed: int | None = None
    top_n_tokens: int | None = None
    grammar: GrammarField | None = None
    adapter_id: str | None = None


class GenerateBody(Body):
    """POST /generate and /generate_stream."""

    inputs: str
    # Without any parameters TGI samples; with parameters that do not say `do_sample` it is greedy.
    parameters: GenerateParameters | None = None

    @property
    def given(self) -> GenerateParameters:
        """The parameters, or those that TGI takes where there are none."""
        return self.parameters or GenerateParameters(do_sample=True)


class CompatGenerateBody(GenerateBody):
    """POST /, which streams where asked to."""

    stream: bool = False


@dataclass(frozen=True, slots=True)
class GenerateTask:
    """A validated request.

    Attributes:
        params: one for each of the `best_of` candidates, with seeds of their own.
        sampling: whether tokens are drawn; where not, no seed is told.
        top_n_tokens: most likely tokens to tell.
    """

    params: tuple[SamplingParams, ...]
    sampling: bool
    top_n_tokens: int


def generate_task(parameters: GenerateParameters, options: ServerOptions, stream: bool) -> GenerateTask:
    """Check parameters as TGI does.

    Raises:
        InvalidRequest: with TGI's message.
    """
    if options.tgi_strict:
        _check_neutral(parameters)
    best_of = parameters.best_of if parameters.best_of is not None else 1
    refusals = (
        ("best_of", not 0 < best_of <= options.max_best_of, f"must be > 0 and <= {options.max_best_of}. Given: {best_of}"),
        ("best_of", best_of != 1 and stream, "!= 1 is not supported when streaming tokens"),
        ("decoder_input_details", parameters.decoder_input_details and stream, "== true is not supported when streaming tokens"),
        ("temperature", (parameters.temperature or 0.0) < 0.0, "must be positive"),
        ("repetition_penalty", not _above(parameters.repetition_penalty, 0.0), "must be strictly positive"),
        ("frequency_penalty", abs(parameters.frequency_penalty or 0.0) > 2.0, "must be >= -2.0 and <= 2.0"),
        ("top_p", not _share(parameters.top_p), "must be > 0.0 and <= 1.0"),
        ("typical_p", not _share(parameters.typical_p), "must be > 0.0 and <= 1.0"),
        ("top_k", (parameters.top_k or 0) < 0, "must be positive"),
        ("max_new_tokens", not _above(parameters.max_new_tokens, 0), "must be strictly positive"),
        (
            "stop",
            len(parameters.stop) > options.max_stop_sequences,
            f"supports up to {options.max_stop_sequences} stop sequences. Given: {len(parameters.stop)}",
        ),
        (
            "top_n_tokens",
            not 0 <= (parameters.top_n_tokens or 0) <= options.max_top_n_tokens,
            f"must be >= 0 and <= {options.max_top_n_tokens}. Given: {parameters.top_n_tokens}",
        ),
        ("seed", not 0 <= (parameters.seed or 0) < 2**64, "must be >= 0 and < 2^64"),
        ("adapter_id", bool(parameters.adapter_id), "is not supported yet"),
    )
    for name, refused, reason in refusals:
        if refused:
            raise InvalidRequest(f"`{name}` {reason}", name)
    grammar = None if parameters.grammar is None else parameters.grammar.grammar(options.tgi_strict)
    sampling = (parameters.do_sample or _warps(parameters)) and parameters.temperature != 0.0
    if best_of > 1 and not sampling:
        raise InvalidRequest("you must use sampling when `best_of` is > 1", "best_of")
    if best_of > 1 and parameters.seed is not None:
        raise InvalidRequest("`seed` must not be set when `best_of` > 1", "seed")
    share, bias = (options.watermark_gamma, options.watermark_delta) if parameters.watermark else (0.0, 0.0)
    seeds = [random.getrandbits(64) if parameters.seed is None else parameters.seed for _ in range(best_of)]
    first, *others = [replace(_params(parameters, sampling, seed, grammar), watermark_gamma=share, watermark_delta=bias) for seed in seeds]
    if parameters.decoder_input_details:  # the candidates have one prompt
        first = replace(first, prompt_logprobs=0)
    return GenerateTask((first, *others), sampling, parameters.top_n_tokens or 0)


def _above(value: float | None, low: float) -> bool:
    return value is None or value > low


def _share(value: float | None) -> bool:
    return value is None or 0.0 < value <= 1.0


def _check_neutral(parameters: GenerateParameters) -> None:
    """Refuse the values that mean "off", as TGI does."""
    for name in ("temperature", "top_k"):
        if not _above(getattr(parameters, name), 0):
            raise InvalidRequest(f"`{name}` must be strictly positive", name)
    for name in ("top_p", "typical_p"):
        if (value := getattr(parameters, name)) is not None and not 0.0 < value < 1.0:
            raise InvalidRequest(f"`{name}` must be > 0.0 and < 1.0", name)


def _warps(parameters: GenerateParameters) -> bool:
    """Whether anything but the default distribution was asked for: TGI samples then, whatever `do_sample` says."""
    off = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "typical_p": 1.0}
    return any(getattr(parameters, name) not in (None, value) for name, value in off.items())


def _params(parameters: GenerateParameters, sampling: bool, seed: int, grammar: Grammar | None) -> SamplingParams:
    given = {
        "top_k": parameters.top_k,
        "top_p": parameters.top_p,
        "typical_p": parameters.typical_p,
        "repetition_penalty": parameters.repetition_penalty,
        "frequency_penalty": parameters.frequency_penalty,
    }
    values: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return SamplingParams(
        temperature=(parameters.temperature if parameters.temperature is not None else 1.0) if sampling else 0.0,
        seed=seed,
        max_tokens=parameters.max_new_tokens,
        stop=tuple(parameters.stop),
        logprobs=parameters.top_n_tokens or 0,
        grammar=grammar,
        include_stop_str_in_output=True,  # TGI keeps the stop string in the text
        **values,
    )


def check_truncate(truncate: int | None, info: EngineInfo) -> None:
    """Raise InvalidRequest, with TGI's message, unless a prompt can be cut to so many tokens."""
    if truncate is not None and not 0 < truncate <= info.max_input_tokens:
        raise InvalidRequest(f"`truncate` must be strictly positive and less than {info.max_input_tokens}. Given: {truncate}", "truncate")


def checked_prompt(token_ids: list[int], parameters: GenerateParameters, info: EngineInfo) -> list[int]:
    """The prompt, cut on its left where `truncate` says so, held against the limits as TGI does.

    Raises:
        ContextTooLong: with TGI's message.
    """
    if parameters.truncate is not None:
        token_ids = token_ids[-parameters.truncate :]
    length = len(token_ids)
    if length > info.max_input_tokens:
        raise ContextTooLong(f"`inputs` must have less than {info.max_input_tokens} tokens. Given: {length}", "inputs")
    checked = min(parameters.max_new_tokens or 1, CHECKED_NEW_TOKENS)
    if length + checked > info.max_total_tokens:
        raise ContextTooLong(
            f"`inputs` tokens + `max_new_tokens` must be <= {info.max_total_tokens}. "
            f"Given: {length} `inputs` tokens and {checked} `max_new_tokens`",
            "max_new_tokens",
        )
    return token_ids
