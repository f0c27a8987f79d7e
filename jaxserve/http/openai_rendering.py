"""Answers in OpenAI's words: bodies, and the parts that events share with them."""

import time
from collections.abc import Sequence
from typing import Any

from jaxserve.http import VERSION
from jaxserve.http.answer import Answers, Sample, SampleResult, SampleToken
from jaxserve.http.service import Service
from jaxserve.request import FinishReason
from jaxserve.tokenizer import Tokenizer

LOWEST_LOGPROB = -9999.0  # JSON has no -inf
FINGERPRINT = f"jaxserve-{VERSION}"
_REASONS = {FinishReason.EOS: "stop", FinishReason.STOP: "stop", FinishReason.LENGTH: "length", FinishReason.ABORT: "abort"}


def finish_reason(sample: Sample) -> str | None:
    """OpenAI's name for why a sample ended."""
    return _REASONS[sample.finish_reason] if sample.finish_reason is not None else None


def usage(answers: Answers) -> dict[str, Any]:
    """Tokens so far."""
    prompt = sum(len(answer.request.prompt_token_ids) for answer in answers.answers)
    completion = answers.num_output_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(answer.meter.num_cached_tokens for answer in answers.answers)},
    }


def chat_logprobs(tokens: Sequence[SampleToken], tokenizer: Tokenizer) -> dict[str, Any]:
    """Log probabilities as chat completions tell them."""

    def one(token_id: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token_id)
        return {"token": data.decode(errors="replace"), "logprob": max(logprob, LOWEST_LOGPROB), "bytes": list(data)}

    content = []
    for token in tokens:
        if (logprobs := token.logprobs) is not None:
            top = [one(*pair) for pair in zip(logprobs.top_token_ids, logprobs.top_raw, strict=True)]
            content.append({**one(token.token_id, logprobs.raw), "top_logprobs": top})
    return {"content": content, "refusal": None}


def completion_logprobs(tokens: Sequence[SampleToken], tokenizer: Tokenizer, offset: int = 0) -> dict[str, Any]:
    """Log probabilities as completions tell them; `offset` is where the first token's text begins."""
    texts, values, tops, offsets = [], [], [], []
    for token in tokens:
        if (logprobs := token.logprobs) is not None:
            texts.append(tokenizer.token_text(token.token_id))
            values.append(max(logprobs.raw, LOWEST_LOGPROB))
            top = zip(logprobs.top_token_ids, logprobs.top_raw, strict=True)
            tops.append({tokenizer.token_text(token_id): max(value, LOWEST_LOGPROB) for token_id, value in top})
            offsets.append(offset)
            offset += len(token.text)
    return {"tokens": texts, "token_logprobs": values, "top_logprobs": tops if any(tops) else None, "text_offset": offsets}


def chat_body(head: dict[str, Any], answers: Answers, results: Sequence[SampleResult], tokenizer: Tokenizer) -> dict[str, Any]:
    """The answer to POST /v1/chat/completions."""
    choices = [
        {
            "index": result.sample.choice,
            "message": {"role": "assistant", "content": result.text, "refusal": None},
            "logprobs": chat_logprobs(result.tokens, tokenizer) if answers.answers[0].request.params.logprobs is not None else None,
            "finish_reason": finish_reason(result.sample),
        }
        for result in results
    ]
    return {**head, "object": "chat.completion", "choices": choices, "usage": usage(answers)}


def completion_body(
    head: dict[str, Any], answers: Answers, results: Sequence[SampleResult], echoes: Sequence[str], tokenizer: Tokenizer
) -> dict[str, Any]:
    """The answer to POST /v1/completions; `echoes` holds what goes before each choice's text."""
    choices = [
        {
            "index": result.sample.choice,
            "text": echoes[result.sample.choice] + result.text,
            "logprobs": completion_logprobs(result.tokens, tokenizer) if answers.answers[0].request.params.logprobs is not None else None,
            "finish_reason": finish_reason(result.sample),
        }
        for result in results
    ]
    return {**head, "object": "text_completion", "choices": choices, "usage": usage(answers)}


def head(service: Service, request_id: str) -> dict[str, Any]:
    """What all bodies and events of an answer begin with."""
    return {"id": request_id, "created": int(time.time()), "model": service.model_name, "system_fingerprint": FINGERPRINT}
