"""Answers in TGI's words: bodies of whole answers and events of streamed ones."""

import math
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from jaxserve.errors import EngineUnavailable, GenerationFailed, JaxserveError
from jaxserve.http.answer import Answers, SampleResult, SampleToken
from jaxserve.http.errors import error_event, failure_kind
from jaxserve.http.request_record import note_error
from jaxserve.http.service import Service
from jaxserve.http.sse import compact, quoted
from jaxserve.http.tgi_types import GenerateParameters, GenerateTask
from jaxserve.request import FinishReason
from jaxserve.tokenizer import Tokenizer

_REASONS = {
    FinishReason.EOS: "eos_token",
    FinishReason.STOP: "stop_sequence",
    FinishReason.LENGTH: "length",
    FinishReason.ABORT: "length",
}


def finish_reason(reason: FinishReason | None) -> str | None:
    """TGI's name for why a sample ended."""
    return None if reason is None else _REASONS[reason]


def _number(logprob: float) -> float | None:
    return logprob if math.isfinite(logprob) else None


def _token(tokenizer: Tokenizer, token_id: int, text: str, logprob: float) -> dict[str, Any]:
    return {"id": token_id, "text": text, "logprob": _number(logprob), "special": tokenizer.is_special(token_id)}


def _sampled(tokenizer: Tokenizer, token: SampleToken) -> dict[str, Any]:
    return _token(tokenizer, token.token_id, token.piece, token.logprobs.processed if token.logprobs else math.nan)


def _top_tokens(tokenizer: Tokenizer, token: SampleToken) -> list[dict[str, Any]]:
    if token.logprobs is None:
        return []
    pairs = zip(token.logprobs.top_token_ids, token.logprobs.top_processed, strict=True)
    return [_token(tokenizer, token_id, tokenizer.token_text(token_id), logprob) for token_id, logprob in pairs]


def mean_logprob(result: SampleResult) -> float:
    """What `best_of` compares."""
    values = [token.logprobs.processed for token in result.tokens if token.logprobs is not None]
    return sum(values) / max(len(values), 1)


def best_first(results: Sequence[SampleResult]) -> list[int]:
    """Places of the results in the order of their mean log probabilities, the highest first."""
    return sorted(range(len(results)), key=lambda place: mean_logprob(results[place]), reverse=True)


def generate_body(
    service: Service,
    answers: Answers,
    results: Sequence[SampleResult],
    parameters: GenerateParameters,
    task: GenerateTask,
    prefix: str,
) -> dict[str, Any]:
    """The answer to POST /generate: the best of the results, the others beside it.

    Args:
        prefix: goes before every text: the prompt, where `return_full_text` asks for it.
    """
    order = best_first(results)
    best, *others = [_details(service, answers, results[place], task, place, parameters.decoder_input_details) for place in order]
    texts = [prefix + results[place].text for place in order]
    body: dict[str, Any] = {"generated_text": texts[0]}
    if parameters.details or parameters.decoder_input_details:
        if others:
            best["best_of_sequences"] = [{"generated_text": text, **details} for text, details in zip(texts[1:], others, strict=True)]
        body["details"] = best
    return body


def _prefill(tokenizer: Tokenizer, answers: Answers) -> list[dict[str, Any]]:
    """The prompt's tokens; nothing comes before the first, so that it has no log probability."""
    answer = answers.answers[0]
    told = [] if answer.prompt_logprobs is None else answer.prompt_logprobs.raw.tolist()
    pairs = zip_longest(answer.request.prompt_token_ids, [None, *map(_number, told)])
    return [{"id": token_id, "text": tokenizer.token_text(token_id), "logprob": logprob} for token_id, logprob in pairs]


def _details(service: Service, answers: Answers, result: SampleResult, task: GenerateTask, place: int, prefill: bool) -> dict[str, Any]:
    tokenizer = service.tokenizer
    tokens = [token for token in result.tokens if token.token_id >= 0]
    details = {
        "finish_reason": finish_reason(result.sample.finish_reason),
        "generated_tokens": result.sample.num_tokens,
        "seed": task.params[place].seed if task.sampling else None,
        "prefill": _prefill(tokenizer, answers) if prefill else [],
        "tokens": [_sampled(tokenizer, token) for token in tokens],
    }
    if task.top_n_tokens:
        details["top_tokens"] = [_top_tokens(tokenizer, token) for token in tokens]
    return details


class GenerateEvents:
    """Events of /generate_stream (see sse.Events): one a token, the last with the whole text; no [DONE]."""

    def __init__(self, service: Service, answers: Answers, parameters: GenerateParameters, task: GenerateTask, prefix: str):
        self._service = service
        self._answers = answers
        self._parameters = parameters
        self._task = task
        self._texts = [prefix]
        self._is_special = service.tokenizer.is_special

    async def read(self) -> bytes:
        return "".join(map(self._event, await self._answers.read())).encode()

    def failed(self, error: JaxserveError) -> bytes:
        self._service.metrics.tgi_failure.labels(failure_kind(error)).inc()
        if isinstance(error, EngineUnavailable) and self._texts[1:]:
            error = GenerationFailed(str(error))  # too late to be sent again
        return error_event("/generate_stream", error).encode()

    def abort(self) -> None:
        self._answers.abort()

    def _event(self, token: SampleToken) -> str:
        self._texts.append(token.text)
        logprob = token.logprobs.processed if token.logprobs is not None else math.nan
        special = "true" if self._is_special(token.token_id) else "false"
        text, details = "null", "null"
        if token.finish_reason is not None:
            text = quoted("".join(self._texts))
            if self._parameters.details:
                details = compact(self._details(token))
        top = f'"top_tokens":{compact(_top_tokens(self._service.tokenizer, token))},' if self._task.top_n_tokens else ""
        value = repr(logprob) if math.isfinite(logprob) else "null"
        return (
            f'data: {{"index":{len(self._texts) - 1},"token":{{"id":{token.token_id},"text":{quoted(token.piece)},"logprob":{value},'
            f'"special":{special}}},{top}"generated_text":{text},"details":{details}}}\n\n'
        )

    def _details(self, token: SampleToken) -> dict[str, Any]:
        return {
            "finish_reason": finish_reason(token.finish_reason),
            "generated_tokens": token.sample.num_tokens,
            "seed": self._task.params[0].seed if self._task.sampling else None,
            "input_length": len(self._answers.answers[0].request.prompt_token_ids),
        }


class FailedEvents:
    """Events (see sse.Events) of a stream that never began: TGI tells even that as an event of an answer with status 200."""

    def __init__(self, service: Service, error: JaxserveError):
        self._service = service
        self._error = error

    async def read(self) -> bytes:
        raise self._error

    def failed(self, error: JaxserveError) -> bytes:
        self._service.metrics.tgi_failure.labels(failure_kind(error)).inc()
        note_error(str(error))
        return error_event("/generate_stream", error).encode()

    def abort(self) -> None:
        """Nothing runs."""
