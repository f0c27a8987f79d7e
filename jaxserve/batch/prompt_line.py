"""jaxserve's own line: {"prompt": ...} or {"messages": [...]}, sampling fields as in /v1/completions, and an optional "id".

Its answer: {"id", "outputs": [{"text", "finish_reason", "completion_tokens"}], "prompt_tokens", "cached_tokens", "digest"}, or
{"id", "error": {"message", "param"}, "digest"} where the line cannot be served.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field

from jaxserve.batch.lines import Line
from jaxserve.batch.task import Record, Task, read_body
from jaxserve.errors import InvalidRequest
from jaxserve.http.body import Unsupported
from jaxserve.http.openai_messages import Message
from jaxserve.http.openai_types import MAX_MESSAGES
from jaxserve.http.sampling_fields import SamplingFields
from jaxserve.llm import LLM, RequestOutput, SampleOutput

DEFAULT_MAX_TOKENS = 256


def _as_prompt(value: Any) -> Any:
    if not isinstance(value, str) and not (isinstance(value, list) and value and all(type(token) is int for token in value)):
        raise ValueError("must be a string or a list of token ids")
    return value


class PromptLine(SamplingFields):
    """A line's object. An unknown field is an error here: nobody reads a thousand answers to find that a setting was misspelt."""

    model_config = ConfigDict(extra="forbid")

    id: Any = None
    prompt: Annotated[Any, BeforeValidator(_as_prompt)] = None
    messages: list[Message] | None = Field(None, min_length=1, max_length=MAX_MESSAGES)
    logprobs: int | None = None
    prompt_logprobs: Unsupported = None


def parse_prompt_line(line: Line, document: Mapping[str, Any], llm: LLM, sampling: Mapping[str, Any]) -> Task:
    """Read a line.

    Args:
        document: the parsed line.
        sampling: fields that hold where the line does not say otherwise.

    Raises:
        InvalidRequest: naming the field.
    """
    body = read_body(PromptLine, {"max_tokens": DEFAULT_MAX_TOKENS, **sampling, **document})
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("one of `prompt` and `messages` must be there", "prompt")
    params = body.sampling_params(llm.info.defaults, body.max_tokens, body.logprobs)
    prompt = body.prompt
    if body.messages is not None:
        prompt = llm.tokenizer.apply_chat_template([message.as_template_value() for message in body.messages])[1]
    if body.truncate_prompt_tokens is not None:
        prompt = body.truncated(llm.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt, llm.info.max_input_tokens)
    return Task(
        [prompt], params, lambda outputs: _answer(line, document, outputs[0]), lambda error: refuse_prompt_line(line, document, error)
    )


def refuse_prompt_line(line: Line, document: Any, error: InvalidRequest) -> Record:
    """The record of a line that cannot be served; `document` is whatever the line held."""
    return {"id": _id(line, document), "error": {"message": str(error), "param": error.param}, "digest": line.digest}


def _answer(line: Line, document: Mapping[str, Any], output: RequestOutput) -> Record:
    return {
        "id": _id(line, document),
        "outputs": [_sample(sample) for sample in output.outputs],
        "prompt_tokens": len(output.prompt_token_ids),
        "cached_tokens": output.num_cached_tokens,
        "digest": line.digest,
    }


def _sample(sample: SampleOutput) -> Record:
    record: Record = {
        "text": sample.text,
        "finish_reason": sample.finish_reason.value if sample.finish_reason else None,
        "completion_tokens": len(sample.token_ids),
    }
    if sample.logprobs:
        record["logprobs"] = [
            {
                "token_id": token_id,
                "logprob": _finite(entry.raw),
                "top": [[top_id, _finite(value)] for top_id, value in zip(entry.top_token_ids, entry.top_raw, strict=True)],
            }
            for token_id, entry in zip(sample.token_ids, sample.logprobs, strict=True)
        ]
    return record


def _finite(value: float) -> float | None:
    """JSON has no infinities."""
    return value if math.isfinite(value) else None


def _id(line: Line, document: Any) -> Any:
    return document["id"] if isinstance(document, Mapping) and document.get("id") is not None else line.number
