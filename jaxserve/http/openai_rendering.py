"""Answers in OpenAI's words: bodies, and the parts that events share with them."""

import time
from collections.abc import Sequence
from typing import Any

from jaxserve.http import VERSION
from jaxserve.http.answer import Answer, Answers, SampleResult, SampleToken
from jaxserve.http.logprobs import chat_logprobs, completion_logprobs, prompt_logprob_columns, vllm_prompt_logprobs, whole_logprobs
from jaxserve.http.openai_types import ChatBody, CompletionBody
from jaxserve.http.service import Service
from jaxserve.http.turn import Message, ToolCall, Turn, plain_finish_reason
from jaxserve.tokenizer import Tokenizer

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
    (answer,) = turn.answers.answers
    prompt: dict[str, Any] = {"prompt_token_ids": answer.request.prompt_token_ids} if body.return_token_ids else {}
    if body.prompt_logprobs is not None:
        prompt["prompt_logprobs"] = vllm_prompt_logprobs(answer.request.prompt_token_ids, answer.prompt_logprobs, tokenizer)
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
        echo, answer = echoes[result.sample.choice], answer_of(answers, result.sample.choice)
        prompt = answer.request.prompt_token_ids
        text, tokens = ("", []) if body.only_prompt else (result.text, result.tokens)
        told = None
        if body.logprobs is not None:
            as_ids = bool(body.return_tokens_as_token_ids)
            of_prompt = prompt_logprob_columns(prompt, answer.prompt_logprobs if body.echo else None, tokenizer, as_ids)
            told = whole_logprobs(of_prompt, completion_logprobs(tokens, tokenizer, len(echo), as_ids))
        choice: dict[str, Any] = {
            "index": index,
            "text": echo + text,
            "logprobs": told,
            "finish_reason": plain_finish_reason(result.sample),
        }
        if body.return_token_ids:
            choice |= {"token_ids": token_ids(tokens), "prompt_token_ids": prompt}
        if body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = vllm_prompt_logprobs(prompt, answer.prompt_logprobs, tokenizer)
        choices.append(choice)
    told_usage = usage(answers, num_told=0 if body.only_prompt else None)
    return {**head, "object": "text_completion", "choices": choices, "usage": told_usage}


def answer_of(answers: Answers, choice: int) -> Answer:
    """The answer that a choice belongs to."""
    return answers.answers[choice // answers.answers[0].request.params.n]


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
