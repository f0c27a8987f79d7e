"""A line of OpenAI's batch files, answered in the shape of OpenAI's output files.

The line names a route and holds its body; what the body says is read by the same classes as the HTTP routes'. The body's `model` is
not compared: files written for another service are answered by the model that is loaded.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from jaxserve.batch.lines import Line
from jaxserve.batch.task import Record, Task, read_body
from jaxserve.errors import InvalidRequest
from jaxserve.http.conversation import AnswerFormat, ChatFormat
from jaxserve.http.errors import openai_error
from jaxserve.http.logprobs import LOWEST_LOGPROB, logprob_columns, prompt_logprob_columns, whole_logprobs
from jaxserve.http.openai_types import ChatBody, CompletionBody
from jaxserve.llm import LLM, RequestOutput, SampleOutput
from jaxserve.request import MAX_TOP_LOGPROBS, FinishReason
from jaxserve.tokenizer import Tokenizer

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
REASONS = {FinishReason.EOS: "stop", FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}


def is_openai_line(document: Any) -> bool:
    """Whether a parsed line is one of OpenAI's."""
    return isinstance(document, Mapping) and "custom_id" in document


def parse_openai_line(line: Line, document: Mapping[str, Any], llm: LLM, sampling: Mapping[str, Any]) -> Task:
    """Read a line.

    Args:
        document: the parsed line.
        sampling: fields that hold where the body does not say otherwise.

    Raises:
        InvalidRequest: naming the field.
    """
    url, body = document.get("url"), document.get("body")
    if document.get("method", "POST") != "POST":
        raise InvalidRequest("`method` must be POST", "method")
    if url not in (CHAT, COMPLETIONS):
        raise InvalidRequest(f"`url` must be {CHAT} or {COMPLETIONS}", "url")
    if not isinstance(body, Mapping):
        raise InvalidRequest("`body` must be an object", "body")
    if body.get("stream"):
        raise InvalidRequest("`stream` is not possible in a batch", "stream")
    fields = {**sampling, **body}
    if "max_completion_tokens" in body and "max_tokens" not in body:
        fields.pop("max_tokens", None)
    answer_format = None
    if url == CHAT:
        chat_format = ChatFormat(llm.tokenizer)
        asked: ChatBody | CompletionBody = read_body(ChatBody, fields)
        conversation = asked.conversation(llm.info.defaults, MAX_TOP_LOGPROBS)
        text, token_ids = chat_format.render(conversation)
        answer_format, params = chat_format.answer_format(conversation, text)
        prompts, echo = [token_ids], False
    else:
        asked = read_body(CompletionBody, fields)
        prompts, echo = [_token_ids(prompt, asked, llm.tokenizer) for prompt in asked.prompt], bool(asked.echo)
        params = asked.params(llm.info.defaults, MAX_TOP_LOGPROBS)
        if asked.picks or asked.only_prompt:
            name = "best_of" if asked.picks else "max_tokens"
            raise InvalidRequest(f"this `{name}` is not possible in a batch", name)
    if asked.prompt_logprobs is not None:
        raise InvalidRequest("`prompt_logprobs` is not possible in a batch", "prompt_logprobs")
    prompts = [asked.truncated(token_ids, llm.info.max_input_tokens) for token_ids in prompts]

    def answer(outputs: list[RequestOutput]) -> Record:
        return _record(line, document, 200, _body(url, line, outputs, llm, echo, answer_format))

    return Task(list(prompts), params, answer, lambda error: refuse_openai_line(line, document, error))


def refuse_openai_line(line: Line, document: Any, error: InvalidRequest) -> Record:
    """The record of a line that cannot be served: the answer that the route would have given."""
    return _record(line, document, *openai_error(error))


def _record(line: Line, document: Mapping[str, Any], status: int, body: Record) -> Record:
    response = {"status_code": status, "request_id": f"{line.digest}-{line.number}", "body": body}
    return {"id": f"batch_req_{line.digest}", "custom_id": document["custom_id"], "response": response, "error": None}


def _token_ids(prompt: str | list[int], body: CompletionBody, tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode(prompt, body.add_special_tokens is not False) if isinstance(prompt, str) else prompt


def _body(url: str, line: Line, outputs: Sequence[RequestOutput], llm: LLM, echo: bool, answer_format: AnswerFormat | None) -> Record:
    samples = [(output, sample) for output in outputs for sample in output.outputs]
    prompt_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    completion_tokens = sum(len(sample.token_ids) for _, sample in samples)
    chat = url == CHAT
    return {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{line.digest}",
        "object": "chat.completion" if chat else "text_completion",
        "created": int(time.time()),
        "model": llm.info.model_id,
        "choices": [
            _chat_choice(index, sample, llm.tokenizer, answer_format)
            if answer_format is not None
            else _completion_choice(index, output, sample, llm.tokenizer, echo)
            for index, (output, sample) in enumerate(samples)
        ],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(output.num_cached_tokens for output in outputs)},
        },
    }


def _chat_choice(index: int, sample: SampleOutput, tokenizer: Tokenizer, answer_format: AnswerFormat) -> Record:
    def told(token_id: int, logprob: float) -> Record:
        data = tokenizer.token_bytes(token_id)
        return {"token": data.decode(errors="replace"), "logprob": max(logprob, LOWEST_LOGPROB), "bytes": list(data)}

    content = [
        {**told(token_id, entry.raw), "top_logprobs": [told(*pair) for pair in zip(entry.top_token_ids, entry.top_raw, strict=True)]}
        for token_id, entry in zip(sample.token_ids, sample.logprobs, strict=False)
    ]
    delta = answer_format.new_parser().push(sample.text, last=True)
    message: Record = {"role": "assistant", "content": delta.content, "refusal": None}
    if delta.reasoning:
        message["reasoning_content"] = delta.reasoning
    reason = _reason(sample)
    if delta.tool_calls:
        functions = [{"name": call.name, "arguments": call.arguments} for call in delta.tool_calls]
        calls = [{"id": call.id, "type": "function", "function": told} for call, told in zip(delta.tool_calls, functions, strict=True)]
        message |= {"content": delta.content or None, "tool_calls": calls}
        reason = "tool_calls" if reason == "stop" else reason
    return {
        "index": index,
        "message": message,
        "logprobs": {"content": content, "refusal": None} if sample.logprobs else None,
        "finish_reason": reason,
    }


def _completion_choice(index: int, output: RequestOutput, sample: SampleOutput, tokenizer: Tokenizer, echoes: bool) -> Record:
    echo = tokenizer.decode(output.prompt_token_ids) if echoes else ""
    logprobs = None
    if sample.logprobs:
        of_prompt = prompt_logprob_columns(output.prompt_token_ids, output.prompt_logprobs if echoes else None, tokenizer)
        logprobs = whole_logprobs(of_prompt, logprob_columns(sample.token_ids, sample.logprobs, tokenizer, len(echo)))
    return {"index": index, "text": echo + sample.text, "logprobs": logprobs, "finish_reason": _reason(sample)}


def _reason(sample: SampleOutput) -> str | None:
    return REASONS.get(sample.finish_reason) if sample.finish_reason is not None else None
