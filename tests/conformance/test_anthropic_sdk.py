"""Anthropic's Python client against the demo model."""

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

pytestmark = pytest.mark.demo
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER: Any = {"name": "get_weather", "description": "The weather in a city.", "input_schema": SCHEMA}


@pytest.fixture(scope="module")
def client(server_url: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server_url, api_key="-", max_retries=0, timeout=120) as client:
        yield client


def _asked(text: str, **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "max_tokens": 100, "messages": [{"role": "user", "content": text}], "extra_body": {"temperature": 0}, **fields}


def test_text_and_its_stream(client: anthropic.Anthropic):
    asked = _asked("What is the capital of France?")
    message = client.messages.create(**asked)
    assert message.content[0].type == "text" and message.content[0].text == "The capital of France is Paris."
    assert (message.stop_reason, message.usage.output_tokens) == ("end_turn", 8)
    counted = client.messages.count_tokens(model=MODEL, messages=asked["messages"])
    assert counted.input_tokens == message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0)
    with client.messages.stream(**asked) as events:
        assert "".join(events.text_stream) == message.content[0].text
        final = events.get_final_message()
    assert (final.stop_reason, final.usage.output_tokens) == ("end_turn", 8)
    cut = client.messages.create(**_asked("What is the capital of France?", stop_sequences=[" is"], system="Answer."))
    assert cut.stop_reason in ("stop_sequence", "end_turn")


def test_tools(client: anthropic.Anthropic):
    asked = _asked("Weather in Paris?", tools=[WEATHER], tool_choice={"type": "tool", "name": "get_weather"})
    message = client.messages.create(**asked)
    (call,) = message.content
    assert call.type == "tool_use" and (call.name, set(call.input)) == ("get_weather", {"city"}) and message.stop_reason == "tool_use"
    with client.messages.stream(**asked) as events:
        (streamed,) = events.get_final_message().content
    assert streamed.type == "tool_use" and streamed.input == call.input
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "21 degrees"}]}
    messages = [*asked["messages"], {"role": "assistant", "content": message.content}, result]
    followed: Any = _asked("", messages=messages, tools=[WEATHER], tool_choice={"type": "none"})
    assert client.messages.create(**followed).content[0].type == "text"


def test_output_format(client: anthropic.Anthropic):
    asked = _asked("Name a city.", output_config={"format": {"type": "json_schema", "schema": SCHEMA}})
    text = client.messages.create(**asked).content[0]
    assert text.type == "text" and set(json.loads(text.text)) == {"city"}


def test_error_classes(client: anthropic.Anthropic):
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        client.messages.create(**_asked("x", max_tokens=0))
    with pytest.raises(anthropic.NotFoundError, match="does not exist"):
        client.messages.create(**_asked("x", model="claude-opus"))
