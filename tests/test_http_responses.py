"""/v1/responses, asked by OpenAI's own client; the engine double repeats what the template renders."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from live_front_end import LiveFrontEnd
from tiny_models import write_tokenizer

from jaxserve.chat_output import MessageDelta, ToolCallDelta
from jaxserve.http.response_items import ResponseItems
from jaxserve.http.response_store import ResponseStore

TOOL: Any = {"type": "function", "name": "now", "parameters": {"type": "object", "properties": {}}, "strict": False}
CALL = 'Hm.\n<tool_call>{"name": "now", "arguments": {"zone": "UTC"}}</tool_call>'


@pytest.fixture(scope="module")
def hermes(front_ends: Callable[[str], LiveFrontEnd]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=front_ends("hermes").url + "/v1", api_key="-", max_retries=0) as client:
        yield client


def test_text(hermes: openai.OpenAI):
    response = hermes.responses.create(model="double", input="hello", temperature=0, metadata={"a": "b"}, instructions="Be brief.")
    assert (response.status, response.output_text, response.metadata, response.model) == ("completed", "hello", {"a": "b"}, "double")
    assert response.usage is not None and response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
    assert response.instructions == "Be brief." and response.output[0].type == "message"


def test_what_is_cut_off_is_incomplete(hermes: openai.OpenAI):
    response = hermes.responses.create(model="double", input="abcdefgh", temperature=0, max_output_tokens=3)
    assert (response.status, response.output_text) == ("incomplete", "abc")
    assert response.incomplete_details is not None and response.incomplete_details.reason == "max_output_tokens"


def test_function_calls_and_their_outputs(hermes: openai.OpenAI):
    response = hermes.responses.create(model="double", input=CALL, temperature=0, tools=[TOOL])
    message, call = response.output
    assert message.type == "message" and response.output_text == "Hm."
    assert call.type == "function_call" and (call.name, json.loads(call.arguments)) == ("now", {"zone": "UTC"})
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "noon"}
    items: Any = [{"role": "user", "content": CALL}, *response.output, output]
    answer = hermes.responses.create(model="double", input=items, temperature=0, tools=[TOOL])
    assert answer.output_text == "noon"  # the last message, as the template has it


def _stream(client: openai.OpenAI, **asked: Any) -> tuple[list[Any], Any]:
    with client.responses.stream(model="double", temperature=0, **asked) as events:
        told: list[Any] = list(events)
        return told, told[-1].response


def _without_ids(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_ids(inner) for name, inner in value.items() if name not in ("id", "call_id", "created_at", "completed_at")}
    return [_without_ids(inner) for inner in value] if isinstance(value, list) else value


@pytest.mark.parametrize("asked", [{"input": "hello"}, {"input": CALL, "tools": [TOOL]}, {"input": "abcdefgh", "max_output_tokens": 3}])
def test_a_stream_tells_the_same_response(hermes: openai.OpenAI, asked: dict[str, Any]):
    whole = hermes.responses.create(model="double", temperature=0, **asked)
    events, final = _stream(hermes, **asked)
    exclude: Any = {"output": {"__all__": {"parsed_arguments", "content"}}}
    assert _without_ids(final.model_dump(exclude=exclude)) == _without_ids(whole.model_dump(exclude=exclude))
    assert final.output_text == whole.output_text
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"] and kinds[-1] in ("response.completed", "response.incomplete")
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == whole.output_text
    numbers = [event.sequence_number for event in events]
    assert numbers == list(range(len(events)))
    if "tools" in asked:
        assert "".join(event.delta for event in events if event.type == "response.function_call_arguments.delta") == '{"zone": "UTC"}'


def test_logprobs(hermes: openai.OpenAI):
    asked: Any = {"input": "hey", "include": ["message.output_text.logprobs"], "top_logprobs": 2}
    whole = hermes.responses.create(model="double", temperature=0, **asked)
    part = whole.output[0].content[0]
    assert [one.token for one in part.logprobs] == ["he", "y"] and len(part.logprobs[0].top_logprobs) == 2
    events, _ = _stream(hermes, **asked)
    told = [one.token for event in events if event.type == "response.output_text.delta" for one in event.logprobs]
    assert told == ["he", "y"]


def test_reasoning(front_ends: Callable[[str], LiveFrontEnd]):
    with openai.OpenAI(base_url=front_ends("thinking").url + "/v1", api_key="-", max_retries=0) as client:
        asked: Any = {"input": "<think>Let me see.</think>42", "reasoning": {"effort": "low"}}
        whole = client.responses.create(model="double", temperature=0, **asked)
        thought, message = whole.output
        assert thought.type == "reasoning" and thought.content is not None and thought.content[0].text == "Let me see."
        assert message.type == "message" and whole.output_text == "42"
        assert whole.usage is not None and whole.usage.output_tokens_details.reasoning_tokens > 3
        events, _ = _stream(client, **asked)
        assert "".join(event.delta for event in events if event.type == "response.reasoning_text.delta") == "Let me see."


def test_a_conversation_goes_on(front_ends: Callable[[str], LiveFrontEnd]):
    with openai.OpenAI(base_url=front_ends("plain").url + "/v1", api_key="-", max_retries=0) as client:
        one = client.responses.create(model="double", input="one", temperature=0, instructions="Only now.", max_output_tokens=9)
        two = client.responses.create(model="double", input="two", temperature=0, previous_response_id=one.id)
        said = f"user: one\nassistant: {one.output_text}\nuser: two\n"
        assert two.output_text.startswith(said) and "Only now." not in two.output_text
        _, streamed = _stream(client, input="three", previous_response_id=two.id)
        assert f"{said}assistant: {two.output_text}\nuser: three" in streamed.output_text
        assert client.responses.retrieve(streamed.id).output_text == streamed.output_text
        client.responses.delete(streamed.id)
        with pytest.raises(openai.NotFoundError, match="not found"):
            client.responses.retrieve(streamed.id)
        unkept = client.responses.create(model="double", input="x", temperature=0, store=False)
        with pytest.raises(openai.NotFoundError, match="not found"):
            client.responses.create(model="double", input="y", previous_response_id=unkept.id)


def test_nothing_is_kept_where_another_process_may_be_asked(tmp_path: Path):
    write_tokenizer(tmp_path)
    live = LiveFrontEnd(tmp_path, {"http_workers": 2})
    live.start()
    answer = live.client.get("/v1/responses/resp_1")
    assert answer.status_code == 400 and "--http-workers 1" in answer.json()["error"]["message"]
    live.stop()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": 7}, "input"),
        ({"input": [7]}, "input[0]"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input[0].call_id"),
        ({"input": [{"type": "reasoning", "content": 5}]}, "input[0].content"),
        ({"input": [{"type": "reasoning", "summary": True}]}, "input[0].content"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"temperature": -1}, "temperature"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
    ],
)
def test_bad_fields(front_ends: Callable[[str], LiveFrontEnd], fields: dict[str, Any], param: str):
    response = front_ends("hermes").client.post("/v1/responses", json={"input": "x", **fields})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_what_a_response_was_made_from(hermes: openai.OpenAI):
    asked: Any = [
        {"role": "developer", "content": [{"type": "input_text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "id": "mine", "content": [{"type": "refusal", "refusal": "No."}, {"type": "output_text", "text": "Well."}]},
        {"type": "reasoning", "id": "mine", "content": [{"type": "reasoning_text", "text": "Hm."}], "summary": 7},
        {"type": "function_call", "call_id": "c", "name": "now", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "noon"},
    ]
    one = hermes.responses.create(model="double", input=asked, temperature=0, tools=[TOOL])
    first = hermes.responses.input_items.list(one.id, order="asc").data
    assert [item.type for item in first] == ["message", "message", "reasoning", "function_call", "function_call_output"]
    told: Any = [item.model_dump(exclude_none=True) for item in first]
    assert told[0]["content"] == [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]
    assert [part.get("text", part.get("refusal")) for part in told[1]["content"]] == ["No.", "Well."]
    assert (told[2]["content"][0]["text"], told[2]["summary"], told[3]["name"], told[4]["output"]) == ("Hm.", [], "now", "noon")
    assert told[1]["id"] == "mine" and len({item["id"] for item in told}) == 5  # else pages would have no end
    two = hermes.responses.create(model="double", input="two", temperature=0, previous_response_id=one.id)
    pages = hermes.responses.input_items.list(two.id, limit=2)
    assert pages.has_more and [item.type for item in pages.data] == ["message", "message"]
    everything: Any = [item.id for item in pages]
    assert everything[:0:-1] == [*(item.id for item in first), one.output[0].id]
    assert hermes.responses.input_items.list(two.id).data[0].content[0].text == "two"  # type: ignore[union-attr]
    hermes.responses.delete(one.id)
    assert len(hermes.responses.input_items.list(two.id).data) == 7
    for wrong in ({"limit": 0}, {"limit": 101}, {"limit": "x"}, {"order": "up"}, {"after": "nobody"}):
        with pytest.raises(openai.BadRequestError) as caught:
            hermes.responses.input_items.list(two.id, extra_query=wrong)
        assert caught.value.param == next(iter(wrong))
    with pytest.raises(openai.NotFoundError):
        hermes.responses.input_items.list(one.id)


def test_the_store_is_bounded():
    store = ResponseStore(max_responses=3, max_bytes=3000)

    def add(name: str, size: int) -> None:
        store.add({"id": name, "output": []}, [], [], [{"role": "user", "content": "x" * size}])

    for number in range(5):
        add(str(number), 1)
        store.get("0" if number < 3 else "2")
    assert [number for number in range(5) if store.get(str(number))] == [2, 3, 4]
    add("large", 2900)
    assert [store.get(name) is not None for name in ("large", "4", "3")] == [True, False, False]
    add("too large", 4000)
    assert store.get("too large") is None and store.get("large") is None


def test_the_store_counts_what_later_responses_keep_alive():
    store = ResponseStore(max_responses=100, max_bytes=3000)
    for number in range(5):
        store.add({"id": f"long {number}", "output": []}, [], [], [{"content": "x" * 900}])
        earlier = store.get(f"long {number}")
        assert earlier is not None
        store.add({"id": f"next {number}", "output": []}, earlier.parts, [], [])
        store.remove(f"long {number}")
    kept = [number for number in range(5) if (response := store.get(f"next {number}")) and len(response.messages) == 1]
    assert kept == [2, 3, 4]
    for number in kept:
        assert store.remove(f"next {number}") and not store.remove(f"next {number}")
    assert store._num_bytes == 0 and not store._num_users


def test_items_in_the_order_in_which_they_come():
    items = ResponseItems()
    deltas = [
        MessageDelta("a", "b", [ToolCallDelta(0, "f", "1")]),
        MessageDelta(tool_calls=[ToolCallDelta(0, arguments="{}")]),
        MessageDelta("", "c"),
    ]
    events = [event for delta in deltas for event in items.push(delta)] + items.end(False)
    assert [(item["type"], item["status"]) for item in items.items] == [
        ("reasoning", "completed"), ("message", "completed"), ("function_call", "completed"), ("message", "incomplete")]  # fmt: skip
    assert [event["output_index"] for event in events] == sorted(event["output_index"] for event in events)
    empty = ResponseItems()
    empty.end(True)
    assert empty.items[0]["content"][0]["text"] == ""
