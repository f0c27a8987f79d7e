"""Random requests, and what their streamed and unstreamed answers say, in one form: the two must be equal."""

import json
import random
import uuid
from typing import Any

import httpx
import pytest

CHAT, COMPLETIONS, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
WORDS = ["the", "weather", "in", "Paris", "is", "42", "naïve", "😀", "list", "\n", "of", "a", "café", "{", '"x"', "<", "think"]
_SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 6}, "days": {"enum": [1, 2, "é"]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
_FUNCTIONS = [
    {"name": "get_weather", "description": "x", "parameters": _SCHEMA},
    {"name": "now", "parameters": {"type": "object", "properties": {}}},
]
_GRAMMARS: list[dict[str, Any]] = [
    {"guided_regex": "(<think>[a-c]{1,9}</think>\n)?[d-f😀]{1,9}\n*"},
    {"guided_choice": ["yes, é", "no"]},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": _SCHEMA}}},
]


def random_request(seed: int, max_tokens: int) -> tuple[str, dict[str, Any]]:
    """A path and a body; the same for the same seed."""
    rng = random.Random(seed)
    path = rng.choice([CHAT, CHAT, CHAT, COMPLETIONS, COMPLETIONS, RESPONSES, MESSAGES])
    text = " ".join(rng.choice(WORDS) for _ in range(rng.randrange(1, 12)))
    limit = rng.randrange(1, max_tokens)
    body: dict[str, Any] = {"seed": seed, "temperature": rng.choice([0, 0.7, 1, 1.5]), "top_p": rng.choice([0.3, 0.9, 1])}
    calls = rng.random() < 0.35
    if path == MESSAGES:
        body |= {"max_tokens": limit, "messages": [{"role": "user", "content": text}], "temperature": 0}
        body |= {"stop_sequences": [rng.choice("aeiou ")]} if rng.random() < 0.4 else {}
        if calls:
            tools = [{"name": each["name"], "input_schema": each["parameters"]} for each in _FUNCTIONS]
            body |= {"tools": tools, "tool_choice": rng.choice([{"type": "any"}, {"type": "tool", "name": "now"}]), "max_tokens": 64}
        return path, body
    body |= _options(rng, limit)
    if path == COMPLETIONS:
        body |= {
            "prompt": rng.choice([text, [text, text[::-1]], [5, 6, 7], [[9, 8], [7]]]),
            "max_tokens": limit,
            "echo": rng.random() < 0.2,
        }
        body |= {"logprobs": rng.randrange(4)} if rng.random() < 0.5 and not body["echo"] else {}
        body |= {"n": rng.randrange(1, 4), "return_token_ids": rng.random() < 0.3}
    elif path == CHAT:
        body |= {"messages": [{"role": "user", "content": text}], "max_tokens": limit, "n": rng.randrange(1, 4)}
        body |= {"logprobs": True, "top_logprobs": rng.randrange(3)} if rng.random() < 0.5 else {}
        if calls:
            choice: Any = rng.choice(["required", {"type": "function", "function": {"name": "get_weather"}}, "auto"])
            body |= {"tools": [{"type": "function", "function": each} for each in _FUNCTIONS], "tool_choice": choice, "max_tokens": 64}
            body |= {"parallel_tool_calls": rng.random() < 0.7}
        elif rng.random() < 0.3:
            body |= rng.choice(_GRAMMARS)
    else:
        body = {name: value for name, value in body.items() if name not in ("stop", "min_tokens", "ignore_eos")}
        body |= {"input": text, "max_output_tokens": limit}
        body |= {"include": ["message.output_text.logprobs"], "top_logprobs": 1} if rng.random() < 0.4 else {}
        if calls:
            body |= {"tools": [{"type": "function", **each} for each in _FUNCTIONS], "tool_choice": "required", "max_output_tokens": 64}
    return path, body


def _options(rng: random.Random, limit: int) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if rng.random() < 0.4:
        options["stop"] = [rng.choice(["a", "e", "th", "\n", ". "]) for _ in range(rng.randrange(1, 4))]
        options["include_stop_str_in_output"] = rng.random() < 0.3
    if rng.random() < 0.2:
        options |= {"ignore_eos": True, "min_tokens": rng.randrange(limit)}
    if rng.random() < 0.3:
        options |= {"repetition_penalty": 1.2, "presence_penalty": 0.5, "logit_bias": {"40": -3, "70": 2}, "min_p": 0.05, "top_k": 50}
    return options


def twins(client: httpx.Client, path: str, body: dict[str, Any]) -> tuple[Any, Any]:
    """What the streamed and the unstreamed answer say. Nothing that is cached of one helps the other.

    The second one's numbers are equal to any that are near: samples that run in batches of other sizes differ in their last bits.
    """
    salts = [{} if path == MESSAGES else {"cache_salt": uuid.uuid4().hex} for _ in range(2)]
    whole = client.post(path, json={**body, **salts[0]})
    assert whole.status_code == 200, (body, whole.text)
    usage = {"stream_options": {"include_usage": True}} if path in (CHAT, COMPLETIONS) else {}
    stream = client.post(path, json={**body, **salts[1], "stream": True, **usage})
    assert stream.status_code == 200, stream.text
    events = [json.loads(line[6:]) for line in stream.text.splitlines() if line.startswith("data: {")]
    told = {CHAT: _joined_chat, COMPLETIONS: _joined_completion, RESPONSES: _last_response, MESSAGES: _joined_message}[path](events)
    return _plain(told), _plain(whole.json(), near=True)


_VARYING = ("id", "call_id", "created", "created_at", "completed_at", "prompt_tokens_details", "input_tokens_details", "input_tokens",
            "cache_read_input_tokens", "system_fingerprint", "object")  # fmt: skip


def _plain(value: Any, near: bool = False) -> Any:
    """Without what differs by itself and empty things; numbers `near`, or as they are."""
    if isinstance(value, dict):
        kept = {name: _plain(inner, near) for name, inner in value.items() if name not in _VARYING}
        return {name: inner for name, inner in kept.items() if inner not in (None, "", [], {})}
    if isinstance(value, list):
        return [_plain(inner, near) for inner in value]
    return pytest.approx(value, abs=1e-3) if near and isinstance(value, float) else value


def _joined_chat(events: list[dict[str, Any]]) -> dict[str, Any]:
    choices: dict[int, dict[str, Any]] = {}
    for choice in (choice for event in events for choice in event["choices"]):
        told = choices.setdefault(choice["index"], {"index": choice["index"], "message": {"tool_calls": []}, "logprobs": {"content": []}})
        message, delta = told["message"], choice["delta"]
        message["role"] = delta.get("role") or message.get("role")
        for name in ("content", "reasoning_content"):
            message[name] = message.get(name, "") + (delta.get(name) or "")
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                message["tool_calls"].append({"type": call["type"], "function": dict(call["function"])})
            else:
                message["tool_calls"][call["index"]]["function"]["arguments"] += call["function"]["arguments"]
        told["logprobs"]["content"] += (choice["logprobs"] or {}).get("content", [])
        told["finish_reason"] = choice["finish_reason"]
    return {"choices": [choices[index] for index in sorted(choices)], "usage": events[-1]["usage"], "model": events[0]["model"]}


def _joined_completion(events: list[dict[str, Any]]) -> dict[str, Any]:
    choices: dict[int, dict[str, Any]] = {}
    for choice in (choice for event in events for choice in event["choices"]):
        told = choices.setdefault(choice["index"], {"index": choice["index"], "text": "", "logprobs": {}, "finish_reason": None})
        told["text"] += choice["text"]
        for name in ("token_ids", "prompt_token_ids"):
            told[name] = told.get(name, []) + choice.get(name, [])
        for name, values in (choice["logprobs"] or {}).items():
            told["logprobs"][name] = told["logprobs"].get(name, []) + (values or [])
        told["finish_reason"] = choice["finish_reason"]
    return {"choices": [choices[index] for index in sorted(choices)], "usage": events[-1]["usage"], "model": events[0]["model"]}


def _last_response(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The last event tells the whole response; the deltas must say the same."""
    response = events[-1]["response"]
    told = ["".join(_delta_text(event, place) for event in events) for place in range(len(response["output"]))]
    assert told == [item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"] for item in response["output"]]
    return response


def _delta_text(event: dict[str, Any], place: int) -> str:
    return event["delta"] if event["type"].endswith(".delta") and event["output_index"] == place else ""


def _joined_message(events: list[dict[str, Any]]) -> dict[str, Any]:
    message = dict(events[0]["message"], content=[])
    for event in events:
        match event["type"]:
            case "content_block_start":
                message["content"].append(dict(event["content_block"], json=""))
            case "content_block_delta":
                block, delta = message["content"][event["index"]], event["delta"]
                name = {"text_delta": "text", "thinking_delta": "thinking", "input_json_delta": "json"}[delta["type"]]
                block[name] += delta["partial_json" if name == "json" else name]
            case "message_delta":
                message |= event["delta"] | {"usage": event["usage"]}
    for block in message["content"]:
        written = block.pop("json")
        if block["type"] == "tool_use":
            try:
                block["input"] = json.loads(written or "{}")
            except ValueError:
                block["input"] = {"invalid_json": written}
    return message
