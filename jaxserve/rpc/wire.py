"""The plain types of request.py to and from the messages of engine.proto.

A sample is called `number * MAX_SAMPLES + index`, where the client gave its request the number.
"""

from collections.abc import Iterator
from dataclasses import asdict, fields
from itertools import islice
from typing import Any

import numpy as np

from jaxserve.errors import ContextTooLong, EngineUnavailable, InvalidRequest, JaxserveError, Overloaded
from jaxserve.grammar import Grammar, GrammarKind
from jaxserve.request import (
    MAX_SAMPLES,
    EngineInfo,
    EngineStats,
    FinishReason,
    PromptLogprobs,
    Request,
    SamplingParams,
    TokenLogprobs,
    TokenOutput,
)
from jaxserve.rpc import engine_pb2 as pb

_REASON_FROM_WIRE = {pb.FinishReason.Value(reason.name): reason for reason in FinishReason}
# Fields that cross under their own name; stop strings and text options stay with the process that detokenizes.
_PLAIN_PARAMS = (
    "n", "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "max_tokens", "min_tokens", "stop_token_ids", "ignore_eos", "logprobs", "prompt_logprobs",
    "watermark_gamma", "watermark_delta",
)  # fmt: skip
_OPTIONAL_PARAMS = ("max_tokens", "logprobs", "prompt_logprobs")


def generate_message(number: int, request: Request) -> pb.ClientMessage:
    """A validated request, under the number that its outputs will carry."""
    params = request.params
    values: dict[str, Any] = {name: value for name in _PLAIN_PARAMS if (value := getattr(params, name)) is not None}
    return pb.ClientMessage(
        generate=pb.Generate(
            number=number,
            request_id=request.request_id,
            prompt_token_ids=request.prompt_token_ids,
            params=pb.SamplingParams(
                **values,
                seed=None if params.seed is None else params.seed % 2**64,
                logit_bias_token_ids=list(params.logit_bias),
                logit_bias_values=list(params.logit_bias.values()),
                grammar=None if params.grammar is None else _grammar_message(params.grammar),
            ),
            cache_salt=request.cache_salt,
            adapter=request.adapter,
        )
    )


def request_from(message: pb.Generate) -> Request:
    """The request of a message; not yet validated."""
    params = message.params
    values: dict[str, Any] = {name: getattr(params, name) for name in _PLAIN_PARAMS}
    values |= {name: None for name in _OPTIONAL_PARAMS if not params.HasField(name)}
    values["stop_token_ids"] = tuple(params.stop_token_ids)
    return Request(
        message.request_id,
        tuple(message.prompt_token_ids),
        SamplingParams(
            **values,
            seed=params.seed if params.HasField("seed") else None,
            logit_bias=dict(zip(params.logit_bias_token_ids, params.logit_bias_values, strict=True)),
            grammar=_grammar_from(params.grammar) if params.HasField("grammar") else None,
        ),
        message.cache_salt,
        message.adapter,
    )


def _grammar_message(grammar: Grammar) -> pb.Grammar:
    return pb.Grammar(kind=grammar.kind.value, text=grammar.text, param=grammar.param)


def _grammar_from(message: pb.Grammar) -> Grammar:
    return Grammar(GrammarKind(message.kind), message.text, message.param)


class OutputColumns:
    """Gathers outputs into one message."""

    def __init__(self) -> None:
        self._samples: list[int] = []
        self._counts: list[int] = []
        self._token_ids: list[int] = []
        self._notes: list[pb.Note] = []
        self._logprobs = pb.Logprobs()
        self._prompt_logprobs: list[pb.PromptLogprobs] = []

    def add(self, number: int, output: TokenOutput, first: bool) -> None:
        """Add a sample's output; `first` where it is the sample's first."""
        if first or output.finish_reason is not None:
            self._notes.append(
                pb.Note(
                    position=len(self._samples),
                    finish_reason=output.finish_reason.name if output.finish_reason else None,
                    error=output.error,
                    num_cached_tokens=output.num_cached_tokens,
                    queue_time=output.queue_time,
                )
            )
        if output.logprobs:
            self._add_logprobs(output)
        if output.prompt_logprobs is not None:
            self._prompt_logprobs.append(_prompt_logprobs_message(len(self._samples), output.prompt_logprobs))
        self._samples.append(number * MAX_SAMPLES + output.index)
        self._counts.append(len(output.token_ids))
        self._token_ids += output.token_ids

    def message(self) -> pb.Outputs:
        """What was added, in order."""
        return pb.Outputs(
            samples=self._samples,
            counts=self._counts,
            token_ids=self._token_ids,
            notes=self._notes,
            logprobs=self._logprobs if self._logprobs.positions else None,
            prompt_logprobs=self._prompt_logprobs,
        )

    def _add_logprobs(self, output: TokenOutput) -> None:
        columns = self._logprobs
        columns.positions.append(len(self._samples))
        for logprobs in output.logprobs:
            columns.raw.append(logprobs.raw)
            columns.processed.append(logprobs.processed)
            columns.top_counts.append(len(logprobs.top_token_ids))
            columns.top_token_ids.extend(logprobs.top_token_ids)
            columns.top_raw.extend(logprobs.top_raw)
            columns.top_processed.extend(logprobs.top_processed)


def _prompt_logprobs_message(position: int, logprobs: PromptLogprobs) -> pb.PromptLogprobs:
    return pb.PromptLogprobs(
        position=position,
        raw=logprobs.raw.astype("<f4").tobytes(),
        ranks=logprobs.ranks.astype("<i4").tobytes(),
        top_token_ids=logprobs.top_token_ids.astype("<i4").tobytes(),
        top_raw=logprobs.top_raw.astype("<f4").tobytes(),
        num_top=logprobs.top_raw.shape[1],
    )


def _prompt_logprobs_from(message: pb.PromptLogprobs) -> PromptLogprobs:
    raw, ranks = np.frombuffer(message.raw, "<f4"), np.frombuffer(message.ranks, "<i4")
    shape = (len(raw), message.num_top)
    return PromptLogprobs(
        raw, ranks, np.frombuffer(message.top_token_ids, "<i4").reshape(shape), np.frombuffer(message.top_raw, "<f4").reshape(shape)
    )


def outputs_from(message: pb.Outputs) -> Iterator[tuple[int, TokenOutput]]:
    """Each sample's name and its output; the request id is left "" for the reader to know.

    `num_cached_tokens` and `queue_time` are told with a sample's first output and its last.
    """
    notes = {note.position: note for note in message.notes}
    counts = list(message.counts)
    logprobs = _logprobs_from(message.logprobs, counts) if message.HasField("logprobs") else {}
    prompt_logprobs = {each.position: _prompt_logprobs_from(each) for each in message.prompt_logprobs}
    token_ids = list(message.token_ids)
    end = 0
    for position, sample in enumerate(list(message.samples)):
        begin, end = end, end + counts[position]
        output = TokenOutput("", sample % MAX_SAMPLES, token_ids[begin:end], logprobs.get(position, []))
        if (note := notes.get(position)) is not None:
            output.finish_reason = _REASON_FROM_WIRE.get(note.finish_reason)
            output.error = note.error
            output.num_cached_tokens = note.num_cached_tokens
            output.queue_time = note.queue_time
        output.prompt_logprobs = prompt_logprobs.get(position)
        yield sample, output


def _logprobs_from(columns: pb.Logprobs, counts: list[int]) -> dict[int, list[TokenLogprobs]]:
    top = zip(columns.top_token_ids, columns.top_raw, columns.top_processed, strict=True)
    each = zip(columns.raw, columns.processed, columns.top_counts, strict=True)

    def one(raw: float, processed: float, top_count: int) -> TokenLogprobs:
        ids_raw_processed = list(islice(top, top_count))
        token_ids, top_raw, top_processed = map(list, zip(*ids_raw_processed, strict=True)) if ids_raw_processed else ([], [], [])
        return TokenLogprobs(raw, processed, token_ids, top_raw, top_processed)

    return {position: [one(*columns_of_token) for columns_of_token in islice(each, counts[position])] for position in columns.positions}


def rejection_message(number: int, error: JaxserveError) -> pb.Rejection:
    """Why a request was not accepted."""
    kind = next((kind for kind, cls in _REJECTIONS if isinstance(error, cls)), pb.Rejection.UNAVAILABLE)
    return pb.Rejection(
        number=number, kind=kind, message=str(error), param=getattr(error, "param", None), retry_after=getattr(error, "retry_after", 0)
    )


def error_from(rejection: pb.Rejection) -> JaxserveError:
    """The error that rejection_message() was made from."""
    if rejection.kind == pb.Rejection.OVERLOADED:
        return Overloaded(rejection.message, rejection.retry_after)
    if rejection.kind == pb.Rejection.UNAVAILABLE:
        return EngineUnavailable(rejection.message, rejection.retry_after)
    error = ContextTooLong if rejection.kind == pb.Rejection.CONTEXT_TOO_LONG else InvalidRequest
    return error(rejection.message, rejection.param if rejection.HasField("param") else None)


# The most special class first.
_REJECTIONS = (
    (pb.Rejection.OVERLOADED, Overloaded),
    (pb.Rejection.CONTEXT_TOO_LONG, ContextTooLong),
    (pb.Rejection.INVALID, InvalidRequest),
)


def info_message(info: EngineInfo) -> pb.EngineInfo:
    """What a front end must know of an engine."""
    return pb.EngineInfo(**asdict(info))


def info_from(message: pb.EngineInfo) -> EngineInfo:
    """The info of a message."""
    values = {field.name: getattr(message, field.name) for field in fields(EngineInfo)}
    defaults = {name: int(value) if name == "top_k" else value for name, value in message.defaults.items()}
    return EngineInfo(**values | {"eos_token_ids": tuple(message.eos_token_ids), "windows": tuple(message.windows), "defaults": defaults})


def stats_message(stats: EngineStats) -> pb.EngineStats:
    """A snapshot of an engine's counters."""
    return pb.EngineStats(**asdict(stats))


def stats_from(message: pb.EngineStats) -> EngineStats:
    """The counters of a message."""
    values: dict[str, Any] = {field.name: getattr(message, field.name) for field in fields(EngineStats)}
    values |= {name: tuple(value) for name, value in values.items() if name.endswith("_counts")}
    return EngineStats(**values)
