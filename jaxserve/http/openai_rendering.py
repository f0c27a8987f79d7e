"""Answers in OpenAI's words: bodies, and the parts that events share with them."""

import time
from collections.abc import Sequence
from typing import Any

from jaxserve.http import VERSION
from jaxserve.http.answer import Answers, SampleResult, SampleToken
from jaxserve.http.openai_types import ChatBody, CompletionBody
from jaxserve.http.service import Service
from jaxserve.http.turn import Message, ToolCall, Turn, plain_finish_reason
from jaxserve.tokenizer import Tokenizer

LOWEST_LOGPROB = -9999.0  # JSON has no -inf
FINGERPRINT = f"jaxserve-{VERSION}"


def usage(answers: Answers, num_reasoning_tokens: int | None = None, num_told: int | None = None) -> dict[str, Any]:
    """Tokens so far; those of reasoning only where the model may think. `num_told`: the output tokens told so far, if not all that came."""
    prompt = sum(len(answer.request.prompt_token_ids) for answer in answers.answers)
    completion = answers.num_output_tokens if num_told is None else num_told
    told: dict[str, Any] = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(answer.meter.num_cached_tokens for answer in answers.answers)},
    }
    if num_reasoning_tokens is not None:
        told["completion_tokens_details"] = {"reasoning_tokens": num_reasoning_tokens}
    return told


def turn_usage(turn: Turn, num_told: int | None = None) -> dict[str, Any]:
    """Tokens so far of a turn; as `usage`."""
    return usage(turn.answers, turn.num_reasoning_tokens if turn.has_reasoning else None, num_told)


def tool_call_body(call: ToolCall) -> dict[str, Any]:
    """A tool call in an assistant's message."""
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def chat_logprobs(tokens: Sequence[SampleToken], tokenizer: Tokenizer, as_ids: bool = False) -> dict[str, Any]:
    """Log probabilities as chat completions tell them; `as_ids` is return_tokens_as_token_ids."""

    def one(token_id: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token_id)
        text = _id_text(token_id) if as_ids else data.decode(errors="replace")
        return {"token": text, "logprob": max(logprob, LOWEST_LOGPROB), "bytes": list(data)}

    content = []
    for token in tokens:
        if (logprobs := token.logprobs) is not None:
            top = [one(*pair) for pair in zip(logprobs.top_token_ids, logprobs.top_raw, strict=True)]
            content.append({**one(token.token_id, logprobs.raw), "top_logprobs": top})
    return {"content": content, "refusal": None}


def completion_logprobs(tokens: Sequence[SampleToken], tokenizer: Tokenizer, offset: int = 0, as_ids: bool = False) -> dict[str, Any]:
    """Log probabilities as completions tell them; `offset` is where the first token's text begins, `as_ids` as above."""
    name = _id_text if as_ids else tokenizer.token_text
    texts, values, tops, offsets = [], [], [], []
    for token in tokens:
        if (logprobs := token.logprobs) is not None:
            texts.append(name(token.token_id))
            values.append(max(logprobs.raw, LOWEST_LOGPROB))
            top = zip(logprobs.top_token_ids, logprobs.top_raw, strict=True)
            tops.append({name(token_id): max(value, LOWEST_LOGPROB) for token_id, value in top})
            offsets.append(offset)
            offset += len(token.text)
    return {"tokens": texts, "token_logprobs": values, "top_logprobs": tops if any(tops) else None, "text_offset": offsets}


def _id_text(token_id: int) -> str:
    return f"token_id:{token_id}"


def token_ids(tokens: Sequence[SampleToken]) -> list[int]:
    """The ids of tokens; an end without a token has none."""
    return [token.token_id for token in tokens if token.token_id >= 0]


def chat_body(head: dict[str, Any], turn: Turn, messages: Sequence[Message], body: ChatBody, tokenizer: Tokenizer) -> dict[str, Any]:
    """The answer to POST /v1/chat/completions."""
    choices = []
    for message in messages:
        told: dict[str, Any] = {"role": "assistant", "content": message.content, "refusal": None}
        if message.tool_calls:
            told |= {"content": message.content or None, "tool_calls": [tool_call_body(call) for call in message.tool_calls]}
        if message.reasoning and body.include_reasoning is not False:
            told["reasoning_content"] = message.reasoning
        choice: dict[str, Any] = {
            "index": message.sample.choice,
            "message": told,
            "logprobs": chat_logprobs(message.tokens, tokenizer, bool(body.return_tokens_as_token_ids)) if body.logprobs else None,
            "finish_reason": message.finish_reason,
        }
        if body.return_token_ids:
            choice["token_ids"] = token_ids(message.tokens)
        choices.append(choice)
    prompt = {"prompt_token_ids": turn.answers.answers[0].request.prompt_token_ids} if body.return_token_ids else {}
    return {**head, "object": "chat.completion", "choices": choices, "usage": turn_usage(turn), **prompt}


def completion_body(
    head: dict[str, Any],
    answers: Answers,
    results: Sequence[SampleResult],
    echoes: Sequence[str],
    body: CompletionBody,
    tokenizer: Tokenizer,
) -> dict[str, Any]:
    """The answer to POST /v1/completions.

    Args:
        results: those to be told, in order.
        echoes: what goes before the text of each sample, by its choice.
    """
    choices = []
    for index, result in enumerate(results):
        echo = echoes[result.sample.choice]
        told = None
        if body.logprobs is not None:
            told = completion_logprobs(result.tokens, tokenizer, len(echo), bool(body.return_tokens_as_token_ids))
        choice: dict[str, Any] = {
            "index": index,
            "text": echo + result.text,
            "logprobs": told,
            "finish_reason": plain_finish_reason(result.sample),
        }
        if body.return_token_ids:
            choice |= {"token_ids": token_ids(result.tokens), "prompt_token_ids": prompt_token_ids(answers, result.sample.choice)}
        choices.append(choice)
    return {**head, "object": "text_completion", "choices": choices, "usage": usage(answers)}


def prompt_token_ids(answers: Answers, choice: int) -> Sequence[int]:
    """Of the prompt that a choice goes on with."""
    return answers.answers[choice // answers.answers[0].request.params.n].request.prompt_token_ids


def best(results: Sequence[SampleResult], best_of: int, n: int) -> list[SampleResult]:
    """Of each prompt's `best_of` results the `n` with the highest mean log probability a token, the best first."""

    def quality(result: SampleResult) -> float:
        values = [token.logprobs.raw for token in result.tokens if token.logprobs is not None]
        return sum(values) / max(len(values), 1)

    picked: list[SampleResult] = []
    for start in range(0, len(results), best_of):
        picked += sorted(results[start : start + best_of], key=quality, reverse=True)[:n]
    return picked


def head(service: Service, request_id: str) -> dict[str, Any]:
    """What all bodies and events of an answer begin with."""
    return {"id": request_id, "created": int(time.time()), "model": service.model_name, "system_fingerprint": FINGERPRINT}
