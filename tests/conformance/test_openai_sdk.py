"""OpenAI's Python client against the demo model: sync, async, streams, tools, structured outputs, responses, error classes."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

pytestmark = pytest.mark.demo
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"

CAPITAL: Any = [{"role": "user", "content": "What is the capital of France?"}]
WEATHER: Any = {"type": "function", "function": {"name": "get_weather", "description": "The weather in a city.", "parameters": {
    "type": "object", "properties": {"city": {"type": "string", "maxLength": 20}, "unit": {"enum": ["celsius", "fahrenheit"]}},
    "required": ["city", "unit"], "additionalProperties": False}}}  # fmt: skip
CLOCK: Any = {
    "type": "function",
    "function": {"name": "now", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}},
}


class City(BaseModel):
    """An answer's form."""

    name: Literal["Paris", "London"]
    inhabitants: int
    river: bool


@pytest.fixture(scope="module")
def client(server_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server_url}/v1", api_key="-", max_retries=0, timeout=120) as client:
        yield client


def test_models(client: openai.OpenAI):
    assert [model.id for model in client.models.list()] == [MODEL] and client.models.retrieve(MODEL).owned_by == "jaxserve"


def test_chat(client: openai.OpenAI):
    answer = client.chat.completions.create(model=MODEL, messages=CAPITAL, temperature=0, max_completion_tokens=20)
    assert answer.choices[0].message.content == "The capital of France is Paris." and answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None and answer.usage.completion_tokens == 8
    assert answer.system_fingerprint
    stopped = client.chat.completions.create(model=MODEL, messages=CAPITAL, temperature=0, stop=" is")
    assert stopped.choices[0].message.content == "The capital of France"


def test_seed_n_and_logprobs(client: openai.OpenAI):
    asked: Any = {
        "model": MODEL,
        "messages": CAPITAL,
        "seed": 7,
        "n": 3,
        "temperature": 1.2,
        "max_tokens": 12,
        "logprobs": True,
        "top_logprobs": 3,
    }
    one, two = client.chat.completions.create(**asked), client.chat.completions.create(**asked)
    texts = [choice.message.content for choice in one.choices]
    assert texts == [choice.message.content for choice in two.choices] and len(set(texts)) > 1
    for choice in one.choices:
        assert choice.logprobs is not None and choice.logprobs.content is not None
        assert all(
            len(token.top_logprobs) == 3 and token.logprob <= token.top_logprobs[0].logprob + 1e-6 for token in choice.logprobs.content
        )
        shown = b"".join(bytes(token.bytes or []) for token in choice.logprobs.content)
        assert shown.decode(errors="replace").startswith(choice.message.content or "")


def test_streams(client: openai.OpenAI):
    asked: Any = {"model": MODEL, "messages": CAPITAL, "temperature": 0, "max_tokens": 20, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "The capital of France is Paris."
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 8
    text = "".join(
        chunk.choices[0].text
        for chunk in client.completions.create(model=MODEL, prompt="1, 2, 3, 4,", temperature=0, max_tokens=8, stream=True)
    )
    assert text.startswith(" 5, 6")


def test_async(server_url: str):
    async def ask() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=f"{server_url}/v1", api_key="-", max_retries=0, timeout=120) as client:
            answers = await asyncio.gather(
                *(client.chat.completions.create(model=MODEL, messages=CAPITAL, temperature=0, max_tokens=20) for _ in range(4))
            )
            pieces = [
                chunk.choices[0].delta.content or ""
                async for chunk in await client.chat.completions.create(
                    model=MODEL, messages=CAPITAL, temperature=0, max_tokens=20, stream=True
                )
            ]
            return [*(answer.choices[0].message.content for answer in answers), "".join(pieces)]

    assert set(asyncio.run(ask())) == {"The capital of France is Paris."}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_tools_that_must_be_called(client: openai.OpenAI, choice: Any):
    messages: Any = [{"role": "user", "content": "What is the weather in Paris, in celsius?"}]
    asked: Any = {"model": MODEL, "messages": messages, "tools": [WEATHER, CLOCK], "tool_choice": choice, "temperature": 0}
    asked |= {"max_tokens": 150, "parallel_tool_calls": False}
    answer = client.chat.completions.create(**asked).choices[0]
    assert answer.finish_reason == "tool_calls" and not answer.message.content
    (call,) = answer.message.tool_calls or [None]
    assert call is not None and call.type == "function" and call.function.name in ("get_weather", "now")
    if choice != "required":
        assert call.function.name == "get_weather"
    arguments = json.loads(call.function.arguments)
    assert call.function.name == "now" or (set(arguments) == {"city", "unit"} and arguments["unit"] in ("celsius", "fahrenheit"))
    with client.chat.completions.stream(**asked) as events:
        streamed = events.get_final_completion().choices[0].message
    (same,) = streamed.tool_calls or [None]
    assert same is not None and (same.function.name, same.function.arguments) == (call.function.name, call.function.arguments)
    messages = [*messages, answer.message, {"role": "tool", "tool_call_id": call.id, "content": "It is 21 degrees and sunny."}]
    followed = client.chat.completions.create(
        model=MODEL, messages=messages, tools=[WEATHER], tool_choice="none", temperature=0, max_tokens=40
    )
    assert followed.choices[0].message.content and not followed.choices[0].message.tool_calls


def test_structured_outputs(client: openai.OpenAI):
    parsed = client.chat.completions.parse(model=MODEL, messages=CAPITAL, response_format=City, temperature=1, seed=1, max_tokens=200)
    assert parsed.choices[0].message.parsed is not None and parsed.choices[0].message.parsed.name in ("Paris", "London")
    loose = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Describe Paris in JSON, shortly."}], response_format={"type": "json_object"},
        temperature=0, max_tokens=100,
    ).choices[0]  # fmt: skip
    assert loose.finish_reason == "length" or isinstance(json.loads(loose.message.content or ""), dict)
    for extra, allowed in (
        ({"guided_choice": ["yes", "no"]}, {"yes", "no"}),
        ({"guided_regex": "(red|green)!"}, {"red!", "green!"}),
        ({"guided_grammar": 'start: "a" | "b"'}, {"a", "b"}),
        ({"structured_outputs": {"json": {"const": 7}}}, {"7"}),
    ):
        answer = client.chat.completions.create(model=MODEL, messages=CAPITAL, extra_body=extra, max_tokens=20)
        assert answer.choices[0].message.content in allowed


def test_responses(client: openai.OpenAI):
    one = client.responses.create(model=MODEL, input="What is the capital of France?", temperature=0, max_output_tokens=30)
    assert one.output_text == "The capital of France is Paris." and one.status == "completed"
    two = client.responses.create(model=MODEL, input="And of Germany?", previous_response_id=one.id, temperature=0, max_output_tokens=30)
    assert two.usage is not None and one.usage is not None and two.usage.input_tokens > one.usage.input_tokens
    with client.responses.stream(model=MODEL, input="What is the capital of France?", temperature=0, max_output_tokens=30) as events:
        kinds = {event.type for event in events}
        assert events.get_final_response().output_text == one.output_text
    assert {"response.created", "response.output_text.delta", "response.completed"} <= kinds
    tool: Any = {"type": "function", "strict": True, **WEATHER["function"]}
    called = client.responses.create(
        model=MODEL, input="Weather in Paris?", tools=[tool], tool_choice="required", temperature=0, max_output_tokens=150
    )
    assert called.output[0].type == "function_call" and set(json.loads(called.output[0].arguments)) == {"city", "unit"}
    parsed = client.responses.parse(model=MODEL, input="Name a city.", text_format=City, temperature=0, max_output_tokens=150)
    assert parsed.output_parsed is not None


def test_error_classes(client: openai.OpenAI):
    def refused(kind: type[openai.APIStatusError], **fields: Any) -> openai.APIStatusError:
        with pytest.raises(kind) as caught:
            client.chat.completions.create(**{"model": MODEL, "messages": CAPITAL, **fields})
        return caught.value

    assert refused(openai.BadRequestError, temperature=-1).param == "temperature"
    assert refused(openai.NotFoundError, model="gpt-5").code == "model_not_found"
    assert refused(openai.BadRequestError, max_tokens=10**6).code == "context_length_exceeded"
    broken: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object", "minProperties": -5}}}
    assert refused(openai.BadRequestError, response_format=broken)
    with pytest.raises(openai.BadRequestError, match="no embeddings"):
        client.embeddings.create(model=MODEL, input="x")
    with pytest.raises(openai.BadRequestError, match="suffix"):
        client.completions.create(model=MODEL, prompt="x", suffix="y")
