"""/v1/messages, asked by Anthropic's own client; the engine double repeats what the template renders."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anthropic
import pytest
from live_front_end import LiveFrontEnd
from tiny_models import write_tokenizer

from jaxserve.http.anthropic_types import CountBody
from jaxserve.request import SamplingParams

TOOL: Any = {"name": "now", "description": "The time", "input_schema": {"type": "object", "properties": {"zone": {"type": "string"}}}}
CALL = 'Hm.\n<tool_call>{"name": "now", "arguments": {"zone": "UTC"}}</tool_call>'


def _client(front_end: LiveFrontEnd, key: str = "-") -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=front_end.url, api_key=key, max_retries=0)


def _said(text: str) -> Any:
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def hermes(front_ends: Callable[[str], LiveFrontEnd]) -> Iterator[anthropic.Anthropic]:
    with _client(front_ends("hermes")) as client:
        yield client


def _asked(text: str, **fields: Any) -> dict[str, Any]:
    return {"model": "double", "max_tokens": 200, "messages": _said(text), **fields}


def test_text(hermes: anthropic.Anthropic):
    message = hermes.messages.create(**_asked("hello", system="Be brief.", metadata={"user_id": "u"}))
    assert [block.text for block in message.content if block.type == "text"] == ["hello"]
    assert (message.role, message.stop_reason, message.stop_sequence) == ("assistant", "end_turn", None)
    assert message.usage.output_tokens == 4 and message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0) == 3
    counted = hermes.messages.count_tokens(model="double", messages=_said("hello"))
    assert counted.input_tokens == 3


def test_why_a_message_ends(hermes: anthropic.Anthropic):
    assert hermes.messages.create(**_asked("abcdef", max_tokens=3)).stop_reason == "max_tokens"
    stopped = hermes.messages.create(**_asked("one STOP two", stop_sequences=["STOP"]))
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "STOP")
    assert stopped.content[0].type == "text" and stopped.content[0].text == "one "


def _stream(client: anthropic.Anthropic, **asked: Any) -> tuple[list[Any], Any]:
    with client.messages.stream(**asked) as events:
        told: list[Any] = list(events)
        return told, events.get_final_message()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tools": [TOOL]},
        {"max_tokens": 3},
        {"stop_sequences": ["."], "tools": [TOOL]},
        {"tools": [TOOL], "tool_choice": {"type": "none"}},
    ],
)
def test_a_stream_tells_the_same_message(hermes: anthropic.Anthropic, fields: dict[str, Any]):
    whole = hermes.messages.create(**_asked(CALL, **fields))
    events, final = _stream(hermes, **_asked(CALL, **fields))

    def blocks(message: Any) -> list[Any]:
        return [block.model_dump(exclude={"id", "parsed_output"}) for block in message.content]

    assert blocks(final) == blocks(whole)
    assert (final.stop_reason, final.stop_sequence, final.usage.output_tokens) == (
        whole.stop_reason, whole.stop_sequence, whole.usage.output_tokens)  # fmt: skip
    kinds = [event.type for event in events]
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop" and kinds.count("content_block_start") == len(whole.content)
    if fields == {"tools": [TOOL]}:
        assert whole.stop_reason == "tool_use" and whole.content[1].input == {"zone": "UTC"}
        pieces = "".join(
            event.delta.partial_json for event in events if event.type == "content_block_delta" and "partial" in str(event.delta)
        )
        assert json.loads(pieces) == {"zone": "UTC"}


def test_thinking(front_ends: Callable[[str], LiveFrontEnd]):
    with _client(front_ends("thinking")) as client:
        asked = _asked("<think>Let me see.</think>42", thinking={"type": "enabled", "budget_tokens": 1024})
        message = client.messages.create(**asked)
        assert [block.type for block in message.content] == ["thinking", "text"]
        assert message.content[0].thinking == "Let me see."
        _, final = _stream(client, **asked)
        assert [block.type for block in final.content] == ["thinking", "text"] and final.content[0].thinking == "Let me see."


def test_blocks_as_messages():
    body = CountBody.model_validate(
        {
            "system": [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief."}],
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Time?", "cache_control": {"type": "ephemeral"}}]},
                {"role": "assistant", "content": [
                    {"type": "thinking", "thinking": "Hm", "signature": ""},
                    {"type": "text", "text": "Let me see."},
                    {"type": "tool_use", "id": "t1", "name": "now", "input": {"zone": "UTC"}}]},
                {"role": "user", "content": [
                    {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "noon"}]},
                    {"type": "text", "text": "And now?"}]},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t2"}]},
            ],
            "tools": [TOOL],
            "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
        }
    )  # fmt: skip
    conversation = body.conversation(SamplingParams())
    assert conversation.messages == [
        {"role": "system", "content": "Be\nbrief."},
        {"role": "user", "content": "Time?"},
        {"role": "assistant", "content": "Let me see.", "reasoning_content": "Hm",
         "tool_calls": [{"id": "t1", "type": "function", "function": {"name": "now", "arguments": {"zone": "UTC"}}}]},
        {"role": "tool", "tool_call_id": "t1", "content": "noon"},
        {"role": "user", "content": "And now?"},
        {"role": "tool", "tool_call_id": "t2", "content": ""},
    ]  # fmt: skip
    assert not conversation.tools.parallel and conversation.tools.tools[0].name == "now"


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "x", "name": "f"}]}]}, "content[0]"),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "x", "name": "f", "input": "{}"}]}]}, "input"),
        ({"messages": [{"role": "user", "content": [7]}]}, "messages[0].content"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0]"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "x"}}, "tool_choice"),
        ({"temperature": -1}, "temperature"),
        ({"stop_sequences": [""]}, "stop"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
    ],
)  # fmt: skip
def test_bad_fields(front_ends: Callable[[str], LiveFrontEnd], fields: dict[str, Any], part: str):
    for stream in (False, True):
        response = front_ends("hermes").client.post("/v1/messages", json={**_asked("x"), "stream": stream, **fields})
        told = response.json()
        assert (response.status_code, told["type"], told["error"]["type"]) == (400, "error", "invalid_request_error")
        assert part in told["error"]["message"]


def test_errors_have_anthropics_classes(hermes: anthropic.Anthropic, tmp_path: Path):
    with pytest.raises(anthropic.NotFoundError, match="does not exist"):
        hermes.messages.create(model="claude", max_tokens=9, messages=_said("x"))
    with pytest.raises(anthropic.BadRequestError, match="temperature"):
        hermes.messages.create(**_asked("x", extra_body={"temperature": -1}))
    write_tokenizer(tmp_path)
    guarded = LiveFrontEnd(tmp_path, server={"api_key": "secret"}, engine={"fail_token_id": 25})  # "7"
    guarded.start()
    try:
        with _client(guarded, "wrong") as client, pytest.raises(anthropic.AuthenticationError):
            client.messages.create(**_asked("x"))
        with _client(guarded, "secret") as client:
            assert client.messages.create(**_asked("x")).stop_reason == "end_turn"
            with pytest.raises(anthropic.InternalServerError):
                client.messages.create(**_asked("7"))
            with pytest.raises(anthropic.APIStatusError, match="the step failed"):
                _stream(client, **_asked("7"))
        with anthropic.Anthropic(base_url=guarded.url, auth_token="secret", max_retries=0) as client:
            client.messages.create(**_asked("x"))
        assert guarded.client.post("/v1/completions", json={"prompt": "x"}, headers={"x-api-key": "secret"}).status_code == 401
    finally:
        guarded.stop()
