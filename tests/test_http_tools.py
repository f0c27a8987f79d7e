"""Tool calls and reasoning over HTTP. The templates here render nothing but what the answer shall be: the engine double repeats it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
from live_front_end import LiveFrontEnd
from tiny_models import write_tokenizer

from jaxserve.chat_output import TOOL_CALL_PARSERS
from jaxserve.grammar import Grammar, GrammarKind
from jaxserve.http.conversation import Conversation, Tool, ToolUse
from jaxserve.request import SamplingParams

CHAT = "/v1/chat/completions"
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "description": "Weather", "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}},
    {"type": "function", "function": {"name": "now"}},
]  # fmt: skip
CALLS = {
    "hermes": (
        'Hm.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "São Paulo"}}\n</tool_call>\n'
        '<tool_call>{"name": "now"}</tool_call>'
    ),
    "llama3_json": '{"name": "get_weather", "parameters": {"city": "São Paulo"}}; {"name": "now", "parameters": {}}',
    "pythonic": "[get_weather(city='São Paulo'), now()]",
    "mistral": '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "São Paulo"}}, {"name": "now", "arguments": {}}]',
}


def ask(front_end: LiveFrontEnd, content: str, **body: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": content}]
    response = front_end.client.post(CHAT, json={"messages": messages, "temperature": 0, "tools": TOOLS, **body})
    assert response.status_code == 200, response.text
    return response.json()


def stream(front_end: LiveFrontEnd, content: str, **body: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The chunks, and each choice's message and finish reason put together as a client does it."""
    messages = [{"role": "user", "content": content}]
    asked = {"messages": messages, "temperature": 0, "tools": TOOLS, "stream": True, **body}
    response = front_end.client.post(CHAT, json=asked)
    assert response.status_code == 200, response.text
    *events, done, _ = response.text.split("\n\n")
    assert done == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    told: dict[int, dict[str, Any]] = {}
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        message = told.setdefault(choice["index"], {"content": "", "reasoning_content": "", "tool_calls": [], "finish_reason": None})
        assert message["finish_reason"] is None
        message["finish_reason"] = choice["finish_reason"]
        delta = choice["delta"]
        message["content"] += delta.get("content") or ""
        message["reasoning_content"] += delta.get("reasoning_content") or ""
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                assert call["index"] == len(message["tool_calls"])
                message["tool_calls"].append({"id": call["id"], "type": call["type"], "function": dict(call["function"])})
            else:
                message["tool_calls"][call["index"]]["function"]["arguments"] += call["function"]["arguments"]
    return chunks, [told[index] for index in sorted(told)]


def functions(message: dict[str, Any]) -> list[tuple[str, Any]]:
    calls = message.get("tool_calls") or ()
    return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]


@pytest.mark.parametrize("name", CALLS)
def test_calls_in_each_format(front_ends: Callable[[str], LiveFrontEnd], name: str):
    front_end = front_ends(name)
    expected = [("get_weather", {"city": "São Paulo"}), ("now", {})]
    answer = ask(front_end, CALLS[name], logprobs=True)
    (choice,) = answer["choices"]
    message = choice["message"]
    assert functions(message) == expected
    assert (choice["finish_reason"], message["content"]) == ("tool_calls", "Hm." if name == "hermes" else None)
    assert len(choice["logprobs"]["content"]) == answer["usage"]["completion_tokens"]
    ids = [call["id"] for call in message["tool_calls"]]
    assert len(set(ids)) == 2 and all(len(one) == 9 if name == "mistral" else one.startswith("call_") for one in ids)
    chunks, (told,) = stream(front_end, CALLS[name])
    assert functions(told) == expected and told["content"] == (message["content"] or "")
    assert told["finish_reason"] == "tool_calls"
    assert sum(bool(chunk["choices"][0]["delta"].get("tool_calls")) for chunk in chunks) > 4  # arguments come as they are written
    _, (first,) = stream(front_end, CALLS[name], parallel_tool_calls=False)
    assert functions(first) == expected[:1] == functions(ask(front_end, CALLS[name], parallel_tool_calls=False)["choices"][0]["message"])


def test_without_tools_nothing_is_taken_for_a_call(front_ends: Callable[[str], LiveFrontEnd]):
    for body in ({"tools": None}, {"tools": []}, {"tool_choice": "none"}):
        choice = ask(front_ends("hermes"), CALLS["hermes"], **body)["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == (CALLS["hermes"], "stop")


def test_a_call_that_is_cut_off(front_ends: Callable[[str], LiveFrontEnd]):
    choice = ask(front_ends("hermes"), CALLS["hermes"], max_tokens=60)["choices"][0]
    assert choice["finish_reason"] == "length" and choice["message"]["tool_calls"][0]["function"]["name"] == "get_weather"


def test_each_choice_is_read_for_itself(front_ends: Callable[[str], LiveFrontEnd]):
    """The second sample begins one token later, so that it holds no whole marker."""
    text = '<tool_call>{"name": "now"}</tool_call>'
    body: dict[str, Any] = {"n": 2, "temperature": 1.0, "seed": 0}
    one, two = ask(front_ends("hermes"), text, **body)["choices"]
    assert functions(one["message"]) == [("now", {})] and one["finish_reason"] == "tool_calls"
    assert two["message"]["content"].startswith("tool_call>") and two["finish_reason"] == "stop"
    _, told = stream(front_ends("hermes"), text, **body)
    assert [functions(message) for message in told] == [[("now", {})], []]
    assert told[1]["content"] == two["message"]["content"]


def test_a_model_whose_format_is_not_known(front_ends: Callable[[str], LiveFrontEnd]):
    asked = {"messages": [{"role": "user", "content": "x"}], "tools": TOOLS}
    error = front_ends("unknown").client.post(CHAT, json=asked).json()["error"]
    assert error["param"] == "tools" and "--tool-call-parser" in error["message"]
    ask(front_ends("unknown"), "x", tool_choice="none")


def test_a_template_that_knows_no_tools_gets_them_told(front_ends: Callable[[str], LiveFrontEnd]):
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": {"name": "now", "arguments": '{"a": 1}'}}]},
        {"role": "tool", "tool_call_id": "1", "content": "noon"},
    ]
    text = ask(front_ends("plain"), "", messages=messages)["choices"][0]["message"]
    said = front_ends("plain").client.post("/chat_tokenize", json={"messages": messages, "tools": TOOLS}).json()["templated_text"]
    assert '"name": "get_weather"' in said and "<tool_response>\nnoon\n</tool_response>" in said
    assert '<tool_call>\n{"name": "now", "arguments": {"a": 1}}\n</tool_call>' in said
    last = text["tool_calls"][-1]["function"]  # of those that the double repeats
    assert (last["name"], json.loads(last["arguments"])) == ("now", {"a": 1})


def test_messages_reach_the_template(front_ends: Callable[[str], LiveFrontEnd]):
    call = {"id": "call_7", "type": "function", "function": {"name": "now", "arguments": '{"zone": "UTC"}'}}
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Time?"}], "name": "Ann"},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "Hm"},
        {"role": "tool", "tool_call_id": "call_7", "content": "noon"},
    ]
    text = front_ends("json").client.post("/chat_tokenize", json={"messages": messages, "tools": TOOLS}).json()["templated_text"]
    told, end = json.JSONDecoder().raw_decode(text)
    del told[2]["thinking"]  # transformers' own name for the reasoning
    assert told == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Time?", "name": "Ann"},
        {"role": "assistant", "content": "", "reasoning_content": "Hm",
         "tool_calls": [{"id": "call_7", "type": "function", "function": {"name": "now", "arguments": {"zone": "UTC"}}}]},
        {"role": "tool", "content": "noon", "tool_call_id": "call_7"},
    ]  # fmt: skip
    assert [tool["function"]["name"] for tool in json.loads(text[end:])] == ["get_weather", "now"]


@pytest.mark.parametrize("text", ["<think>\nLet me see. \n</think>\n\n42", "<think>Tools!</think>\n" + CALLS["hermes"]])
def test_reasoning(front_ends: Callable[[str], LiveFrontEnd], text: str):
    answer = ask(front_ends("thinking"), text, stop=["never"])
    message, reason = answer["choices"][0]["message"], answer["choices"][0]["finish_reason"]
    assert message["reasoning_content"] in ("Let me see.", "Tools!")
    assert message["content"] == ("42" if "42" in text else "Hm.") and reason == ("stop" if "42" in text else "tool_calls")
    assert 0 < answer["usage"]["completion_tokens_details"]["reasoning_tokens"] < answer["usage"]["completion_tokens"]
    chunks, (told,) = stream(front_ends("thinking"), text, stop=["never"], stream_options={"include_usage": True})
    assert (told["reasoning_content"], told["content"]) == (message["reasoning_content"], message["content"])
    assert chunks[-1]["usage"] == answer["usage"]
    hidden = ask(front_ends("thinking"), text, include_reasoning=False)["choices"][0]["message"]
    assert "reasoning_content" not in hidden and hidden["content"] == message["content"]


def test_the_parsers_named_by_flags(tmp_path: Path):
    write_tokenizer(tmp_path)
    options = {"tool_call_parser": "pythonic", "reasoning_parser": "deepseek_r1"}
    front_end = LiveFrontEnd(tmp_path, server=options)
    front_end.start()
    try:
        assert front_end.service.chat_format.tool_format is TOOL_CALL_PARSERS["pythonic"]
        body = {"messages": [{"role": "user", "content": "a</think>b"}], "temperature": 0}
        message = front_end.client.post(CHAT, json=body).json()["choices"][0]["message"]
        assert message["reasoning_content"] == "user: a" and message["content"].startswith("b")
    finally:
        front_end.stop()


def test_openai_sdk_puts_the_stream_together(front_ends: Callable[[str], LiveFrontEnd]):
    with openai.OpenAI(base_url=front_ends("hermes").url + "/v1", api_key="-", max_retries=0) as client:
        asked: Any = {"model": "double", "messages": [{"role": "user", "content": CALLS["hermes"]}], "tools": TOOLS, "temperature": 0}
        with client.chat.completions.stream(**asked) as events:
            message = events.get_final_completion().choices[0].message
        assert [call.function.name for call in message.tool_calls or ()] == ["get_weather", "now"]
        assert json.loads((message.tool_calls or [])[0].function.arguments) == {"city": "São Paulo"}
        assert message.content == "Hm."


@pytest.mark.parametrize("name", CALLS)
def test_beside_a_response_format_tools_may_be_called(front_ends: Callable[[str], LiveFrontEnd], name: str):
    """The double writes what it is asked, so this is about the reading; that the grammar allows both, tests/test_chat_output.py shows."""
    body: dict[str, Any] = {"response_format": {"type": "json_object"}}
    called = CALLS[name].removeprefix("Hm.\n")
    message = ask(front_ends(name), called, **body)["choices"][0]["message"]
    assert functions(message) == [("get_weather", {"city": "São Paulo"}), ("now", {})] and message["content"] is None
    answer = json.dumps({"a": CALLS["hermes"], "b": CALLS["mistral"]}, ensure_ascii=False)
    choice = ask(front_ends(name), answer, **body)["choices"][0]
    assert (choice["message"]["content"], choice["message"].get("tool_calls"), choice["finish_reason"]) == (answer, None, "stop")
    _, (told,) = stream(front_ends(name), answer, **body)
    assert (told["content"], told["tool_calls"]) == (answer, [])


def test_the_grammar_beside_tools_names_both_fields(front_ends: Callable[[str], LiveFrontEnd]):
    tools = ToolUse([Tool("now")])
    params = SamplingParams(grammar=Grammar.json_object())
    for choice, kind, param in (
        (tools, GrammarKind.EBNF, "response_format with tools"),
        (ToolUse(), GrammarKind.JSON_OBJECT, "response_format"),
    ):
        _, asked = front_ends("hermes").service.chat_format.answer_format(Conversation([], params, choice), "")
        assert asked.grammar is not None and (asked.grammar.kind, asked.grammar.param) == (kind, param)
    told, asked = front_ends("hermes").service.chat_format.answer_format(
        Conversation([], replace(params, grammar=Grammar.ebnf('root ::= "a"')), tools), ""
    )
    assert asked.grammar == Grammar.ebnf('root ::= "a"') and told.tool_format is not None and not told.alone


def test_a_schema_under_tgis_name_of_it(front_ends: Callable[[str], LiveFrontEnd]):
    schema = {"type": "object", "properties": {"zone": {"type": "string"}}}
    tools = [{"type": "function", "function": {"name": "now", "arguments": schema}}]
    body = {"messages": [{"role": "user", "content": "x"}], "tools": tools}
    text = front_ends("json").client.post("/chat_tokenize", json=body).json()["templated_text"]
    assert f'"parameters": {json.dumps(schema)}' in text


def test_roles_are_openais_and_the_templates(front_ends: Callable[[str], LiveFrontEnd]):
    def told(name: str, role: str) -> int:
        body = {"messages": [{"role": role, "content": "x"}], "temperature": 3, "max_tokens": 2}
        return front_ends(name).client.post(CHAT, json=body).status_code

    assert [told("json", role) for role in ("user", "developer", "tool", "function", "alien", "ipython")] == [200] * 4 + [400] * 2
    assert told("ipython", "ipython") == 200
