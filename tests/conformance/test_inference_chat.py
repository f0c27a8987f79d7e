"""huggingface_hub's InferenceClient.chat_completion, with tools and response_format, against the demo model."""

import json
from typing import Any

import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError

pytestmark = [pytest.mark.demo, pytest.mark.usefixtures("hub_online")]
CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS: Any = [{"type": "function", "function": {"name": "get_weather", "description": "The weather in a city.", "parameters": SCHEMA}}]


@pytest.fixture
def client(server_url: str) -> InferenceClient:
    return InferenceClient(base_url=server_url, timeout=120)


def test_chat(client: InferenceClient):
    answer = client.chat_completion(CAPITAL, max_tokens=20, temperature=0, logprobs=True, top_logprobs=2)
    assert answer.choices[0].message.content == "The capital of France is Paris."
    assert answer.choices[0].logprobs is not None and len(answer.choices[0].logprobs.content) == answer.usage.completion_tokens
    chunks = list(client.chat_completion(CAPITAL, max_tokens=20, temperature=0, stream=True, stream_options={"include_usage": True}))  # type: ignore[arg-type]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == answer.choices[0].message.content
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == answer.usage.completion_tokens


@pytest.mark.parametrize("choice", ["required", {"function": {"name": "get_weather"}}])
def test_tools(client: InferenceClient, choice: Any):
    asked: Any = {"tools": TOOLS, "tool_choice": choice, "max_tokens": 100, "temperature": 0}
    message = client.chat_completion(CAPITAL, **asked).choices[0].message
    assert message.tool_calls is not None
    (call,) = message.tool_calls[:1]
    assert call.function.name == "get_weather" and set(json.loads(str(call.function.arguments))) == {"city"}
    streamed = [chunk.choices[0].delta for chunk in client.chat_completion(CAPITAL, stream=True, **asked) if chunk.choices]
    calls = [call for delta in streamed for call in delta.tool_calls or ()]
    assert "".join(each.function.arguments for each in calls if each.index == 0) == call.function.arguments


@pytest.mark.parametrize(
    "response_format",
    [
        {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA, "strict": True}},
        {"type": "json", "value": SCHEMA},  # as TGI has it
    ],
    ids=["openai", "tgi"],
)
def test_response_format(client: InferenceClient, response_format: Any):
    answer = client.chat_completion(CAPITAL, response_format=response_format, max_tokens=60, temperature=1, seed=3)
    assert set(json.loads(answer.choices[0].message.content or "")) == {"city"}
    words = client.chat_completion(CAPITAL, response_format={"type": "regex", "value": "(yes|no)!"}, max_tokens=10)  # type: ignore[arg-type]
    assert words.choices[0].message.content in ("yes!", "no!")


def test_errors(client: InferenceClient):
    with pytest.raises(HfHubHTTPError, match="tool_choice"):
        client.chat_completion(CAPITAL, tool_choice="required")
