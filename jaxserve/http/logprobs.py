"""Log probabilities in OpenAI's words, and in vLLM's."""

from collections.abc import Callable, Sequence
from typing import Any

from jaxserve.http.answer import SampleToken
from jaxserve.request import PromptLogprobs, TokenLogprobs
from jaxserve.tokenizer import Tokenizer

LOWEST_LOGPROB = -9999.0  # JSON has no -inf

type LogprobColumns = dict[str, list[Any]]


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


def completion_logprobs(tokens: Sequence[SampleToken], tokenizer: Tokenizer, offset: int = 0, as_ids: bool = False) -> LogprobColumns:
    """Log probabilities of an answer as completions tell them; `offset` is where the first token's text begins, `as_ids` as above."""
    name = _id_text if as_ids else tokenizer.token_text
    told: LogprobColumns = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token in tokens:
        if (logprobs := token.logprobs) is not None:
            _add_logprob(told, name, token.token_id, logprobs.raw, logprobs.top_token_ids, logprobs.top_raw, offset)
            offset += len(token.text)
    return told


def logprob_columns(token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs], tokenizer: Tokenizer, offset: int) -> LogprobColumns:
    """The same where each token's text counts by itself."""
    told: LogprobColumns = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token_id, each in zip(token_ids, logprobs, strict=False):
        _add_logprob(told, tokenizer.token_text, token_id, each.raw, each.top_token_ids, each.top_raw, offset)
        offset += len(tokenizer.token_text(token_id))
    return told


def prompt_logprob_columns(
    prompt: Sequence[int], logprobs: PromptLogprobs | None, tokenizer: Tokenizer, as_ids: bool = False
) -> LogprobColumns:
    """The same of a prompt that is told (`echo`): its first token has no log probability."""
    name = _id_text if as_ids else tokenizer.token_text
    told: LogprobColumns = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    if logprobs is None:
        return told
    texts, offset = tokenizer.detokenizer(), 0
    columns = (logprobs.raw.tolist(), logprobs.top_token_ids.tolist(), logprobs.top_raw.tolist())
    for place, token_id in enumerate(prompt):
        if place == 0:
            for column, value in zip(told.values(), (name(token_id), None, None, 0), strict=True):
                column.append(value)
        else:
            raw, top_ids, top_raw = (column[place - 1] for column in columns)
            _add_logprob(told, name, token_id, raw, top_ids, top_raw, offset)
        offset += len(texts.push(token_id))
    return told


def _add_logprob(
    told: LogprobColumns,
    name: Callable[[int], str],
    token_id: int,
    raw: float,
    top_ids: Sequence[int],
    top_raw: Sequence[float],
    offset: int,
) -> None:
    told["tokens"].append(name(token_id))
    told["token_logprobs"].append(max(raw, LOWEST_LOGPROB))
    top = {name(top_id): max(value, LOWEST_LOGPROB) for top_id, value in zip(top_ids, top_raw, strict=True)}
    # The chosen token is always among the most likely that are told, where any are.
    told["top_logprobs"].append({**top, told["tokens"][-1]: told["token_logprobs"][-1]} if top else None)
    told["text_offset"].append(offset)


def whole_logprobs(*parts: LogprobColumns) -> dict[str, Any]:
    """Columns joined; no `top_logprobs` where none were asked for."""
    told: dict[str, Any] = {name: [value for part in parts for value in part[name]] for name in parts[0]}
    return {**told, "top_logprobs": told["top_logprobs"] if any(told["top_logprobs"]) else None}


def vllm_prompt_logprobs(prompt: Sequence[int], logprobs: PromptLogprobs | None, tokenizer: Tokenizer) -> list[Any]:
    """vLLM's `prompt_logprobs`: for each token, by token id, its log probability, rank and text, and those of the most likely ones."""
    if logprobs is None:
        return [None for _ in prompt[:1]]
    told: list[Any] = [None]
    columns = (prompt[1:], logprobs.raw.tolist(), logprobs.ranks.tolist(), logprobs.top_token_ids.tolist(), logprobs.top_raw.tolist())
    for token_id, raw, rank, top_ids, top_raw in zip(*columns, strict=True):
        each = {token_id: (raw, rank)} | {
            top_id: (value, place) for place, (top_id, value) in enumerate(zip(top_ids, top_raw, strict=True), 1)
        }
        told.append(
            {
                str(one): {"logprob": max(value, LOWEST_LOGPROB), "rank": place, "decoded_token": tokenizer.token_text(one)}
                for one, (value, place) in each.items()
            }
        )
    return told


def _id_text(token_id: int) -> str:
    return f"token_id:{token_id}"
