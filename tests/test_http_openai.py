"""/v1/*: bodies and events as OpenAI's clients read them. The engine double answers with the prompt's own tokens."""

import json
from dataclasses import replace
from typing import Any

import huggingface_hub.constants
import openai
import pytest
from huggingface_hub import InferenceClient
from live_front_end import LiveFrontEnd

from jaxserve.grammar import Grammar
from jaxserve.http.answer import Sample, SampleResult, SampleToken
from jaxserve.http.openai_rendering import best
from jaxserve.http.openai_types import CompletionBody
from jaxserve.request import TokenLogprobs


def _post(front_end: LiveFrontEnd, path: str, **body: Any) -> dict[str, Any]:
    response = front_end.client.post(path, json={"temperature": 0, **body}, timeout=20)
    assert response.status_code == 200, response.text
    return response.json()


def _events(front_end: LiveFrontEnd, path: str, **body: Any) -> list[Any]:
    """Payloads of the stream's events; the last must be [DONE]."""
    response = front_end.client.post(path, json={"temperature": 0, "stream": True, **body}, timeout=20)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def _chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_models(front_end: LiveFrontEnd):
    listed = front_end.client.get("/v1/models").json()
    assert [(model["id"], model["object"]) for model in listed["data"]] == [("double", "model")]
    assert front_end.client.get("/v1/models/double").json()["id"] == "double"
    assert front_end.client.get("/v1/models/other").status_code == 404


def test_chat(front_end: LiveFrontEnd):
    answer = _post(front_end, "/v1/chat/completions", model="double", messages=_chat("hello"), max_tokens=9)
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "user: hello\n", "refusal": None}
    assert (choice["finish_reason"], choice["index"], choice["logprobs"]) == ("length", 0, None)
    usage = answer["usage"]
    assert usage["completion_tokens"] == 9 and usage["total_tokens"] == 9 + usage["prompt_tokens"]
    assert answer["object"] == "chat.completion" and answer["id"].startswith("chatcmpl-")


def test_chat_without_max_tokens_ends_by_itself(front_end: LiveFrontEnd):
    answer = _post(front_end, "/v1/chat/completions", messages=_chat("hi there"))
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["choices"][0]["message"]["content"].startswith("user: hi there\nassistant")


def test_message_parts_and_the_end_of_a_conversation(front_end: LiveFrontEnd):
    messages = [{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}]
    assert "user: one\ntwo" in _post(front_end, "/v1/chat/completions", messages=messages)["choices"][0]["message"]["content"]
    unfinished = [*_chat("count"), {"role": "assistant", "content": "one, two"}]
    assert _post(front_end, "/v1/chat/completions", messages=unfinished)["choices"][0]["message"]["content"].endswith("one, two")
    finished = _post(front_end, "/v1/chat/completions", messages=unfinished, add_generation_prompt=True)
    assert finished["choices"][0]["message"]["content"].endswith("assistant: ")


def test_chat_stream_is_one_event_a_token(front_end: LiveFrontEnd):
    role, *events, usage = _events(
        front_end, "/v1/chat/completions", messages=_chat("hello"), max_tokens=9, stream_options={"include_usage": True}
    )
    assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert len(events) == 9 == usage["usage"]["completion_tokens"]
    assert "".join(event["choices"][0]["delta"]["content"] for event in events) == "user: hello\n"
    assert [event["choices"][0]["finish_reason"] for event in events] == [None] * 8 + ["length"]
    assert all(event["usage"] is None and event["object"] == "chat.completion.chunk" for event in [role, *events])
    assert usage["choices"] == [] and len({event["id"] for event in [role, *events, usage]}) == 1


def test_no_usage_unless_asked_for(front_end: LiveFrontEnd):
    events = _events(front_end, "/v1/chat/completions", messages=_chat("hello"), max_tokens=3)
    assert all("usage" not in event and event["choices"] for event in events)


def test_stop_strings_are_never_streamed(front_end: LiveFrontEnd):
    text = "abc STO STOP def"
    body: dict[str, Any] = {"prompt": text, "max_tokens": 100, "stop": ["STOP", "never"]}
    events = _events(front_end, "/v1/completions", **body)
    assert "".join(event["choices"][0]["text"] for event in events) == "abc STO "
    assert events[-1]["choices"][0]["finish_reason"] == "stop"
    answer = _post(front_end, "/v1/completions", **body)
    assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == ("abc STO ", "stop")
    assert answer["usage"]["completion_tokens"] == len(events)
    kept = _post(front_end, "/v1/completions", **body, include_stop_str_in_output=True)
    assert kept["choices"][0]["text"] == "abc STO STOP"
    assert front_end.idle()


def test_characters_cut_into_tokens(front_end: LiveFrontEnd):
    text = "naïve 😀 — 中文"
    events = _events(front_end, "/v1/completions", prompt=text, max_tokens=200)
    pieces = [event["choices"][0]["text"] for event in events]
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces)
    assert len(pieces) > len(text)  # one event a token, also where it ends no character
    assert _post(front_end, "/v1/completions", prompt=text, max_tokens=200)["choices"][0]["text"] == text


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [("abc", ["abc"]), (["abc", "xyz"], ["abc", "xyz"]), ([67, 68, 69], ["abc"]), ([[67, 68], [69]], ["ab", "c"])],
)
def test_kinds_of_prompt(front_end: LiveFrontEnd, prompt: Any, texts: list[str]):
    answer = _post(front_end, "/v1/completions", prompt=prompt)
    assert [choice["text"] for choice in answer["choices"]] == texts
    echoed = _post(front_end, "/v1/completions", prompt=prompt, echo=True)
    assert [choice["text"] for choice in echoed["choices"]] == [2 * text for text in texts]


def test_samples_and_prompts_are_numbered(front_end: LiveFrontEnd):
    body: dict[str, Any] = {"prompt": ["abc", "wxyz"], "n": 2, "temperature": 1.0, "seed": 0, "echo": True}
    expected = ["abcabc", "abcbca", "wxyzwxyz", "wxyzxyzw"]
    assert [choice["text"] for choice in _post(front_end, "/v1/completions", **body)["choices"]] == expected
    texts = dict.fromkeys(range(4), "")
    for event in _events(front_end, "/v1/completions", **body):
        texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert list(texts.values()) == expected


def test_completions_default_to_16_tokens(front_end: LiveFrontEnd):
    assert _post(front_end, "/v1/completions", prompt="a b c d e f g h i j k l m n o p")["usage"]["completion_tokens"] == 16


def test_chat_logprobs(front_end: LiveFrontEnd):
    body: dict[str, Any] = {"messages": _chat("hello"), "max_tokens": 4, "logprobs": True, "top_logprobs": 2}
    content = _post(front_end, "/v1/chat/completions", **body)["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == ["u", "s", "er", ":"]
    assert content[2]["bytes"] == [101, 114] and content[2]["logprob"] == -0.25
    assert [top["logprob"] for top in content[2]["top_logprobs"]] == [-0.25, -1.25]
    events = _events(front_end, "/v1/chat/completions", **body)[1:]
    assert [event["choices"][0]["logprobs"]["content"][0] for event in events] == content


def test_completion_logprobs(front_end: LiveFrontEnd):
    body: dict[str, Any] = {"prompt": "hello", "max_tokens": 3, "logprobs": 1}
    told = _post(front_end, "/v1/completions", **body)["choices"][0]["logprobs"]
    assert told == {
        "tokens": ["he", "ll", "o"],
        "token_logprobs": [-0.25] * 3,
        "top_logprobs": [{"he": -0.25}, {"ll": -0.25}, {"o": -0.25}],
        "text_offset": [0, 2, 4],
    }
    events = _events(front_end, "/v1/completions", **body)
    assert [event["choices"][0]["logprobs"]["text_offset"] for event in events] == [[0], [2], [4]]


def test_logprobs_of_the_prompt(front_end: LiveFrontEnd):
    """As lm-eval scores texts: echoed, with the log probabilities of the prompt's tokens before the answer's."""
    body: dict[str, Any] = {"prompt": ["hello", [67, 68]], "max_tokens": 1, "logprobs": 1, "echo": True, "n": 2}
    choices = _post(front_end, "/v1/completions", **body)["choices"]
    assert [choice["text"] for choice in choices] == ["hellohe", "hellohe", "aba", "aba"]
    assert (
        choices[0]["logprobs"]
        == choices[1]["logprobs"]
        == {
            "tokens": ["he", "ll", "o", "he"],
            "token_logprobs": [None, -0.25, -0.25, -0.25],
            "top_logprobs": [None, {"ll": -0.25}, {"o": -0.25}, {"he": -0.25}],
            "text_offset": [0, 2, 4, 5],
        }
    )
    streamed: dict[int, dict[str, list[Any]]] = {}
    for choice in (event["choices"][0] for event in _events(front_end, "/v1/completions", **body)):
        for name, values in choice["logprobs"].items():
            streamed.setdefault(choice["index"], {}).setdefault(name, []).extend(values)
    assert [streamed[index] for index in range(4)] == [choice["logprobs"] for choice in choices]
    only = _post(front_end, "/v1/completions", **{**body, "max_tokens": 0, "n": 1, "return_token_ids": True})
    assert [choice["text"] for choice in only["choices"]] == ["hello", "ab"] and only["usage"]["completion_tokens"] == 0
    assert only["choices"][0]["logprobs"]["tokens"] == ["he", "ll", "o"] and only["choices"][0]["token_ids"] == []


def test_vllms_prompt_logprobs(front_end: LiveFrontEnd):
    (choice,) = _post(front_end, "/v1/completions", prompt=[67, 68], prompt_logprobs=1)["choices"]
    assert choice["prompt_logprobs"] == [None, {"68": {"logprob": -0.25, "rank": 1, "decoded_token": "b"}}]
    chat = _post(front_end, "/v1/chat/completions", messages=_chat("hi"), prompt_logprobs=0, max_tokens=1)
    assert len(chat["prompt_logprobs"]) == chat["usage"]["prompt_tokens"] and chat["prompt_logprobs"][0] is None


def test_vllm_fields_reach_the_engine(front_end: LiveFrontEnd):
    answer = _post(front_end, "/v1/completions", prompt="abcdef", max_tokens=20, ignore_eos=True)
    assert answer["choices"][0]["text"] == ("abcdef" * 4)[:20]
    assert _post(front_end, "/v1/completions", prompt="abcdef", max_tokens=20, stop_token_ids=[69])["choices"][0]["text"] == "ab"
    assert _post(front_end, "/v1/completions", prompt="ab", max_tokens=9, min_tokens=5)["usage"]["completion_tokens"] == 6
    _post(front_end, "/v1/completions", prompt="ab", top_k=-1, min_p=0.1, repetition_penalty=1.1, logit_bias={"67": 1}, user="me")


@pytest.mark.parametrize(
    ("fields", "grammar"),
    [
        ({"regex": "a+"}, Grammar.regex("a+")),
        ({"ebnf": 'root ::= "a"'}, Grammar.ebnf('root ::= "a"')),
        ({"json_schema": '{"type": "null"}'}, Grammar.json_schema({"type": "null"})),
    ],
)
def test_sglangs_names_mean_the_same(fields: dict[str, Any], grammar: Grammar):
    params = CompletionBody.model_validate({"prompt": "a", "no_stop_trim": True, **fields}).params({}, 20)
    assert (params.grammar, params.include_stop_str_in_output) == (grammar, True)
    assert params.grammar is not None and params.grammar.param == next(iter(fields))


def test_null_is_absence(front_end: LiveFrontEnd):
    names = (
        "model",
        "n",
        "stop",
        "seed",
        "stream",
        "stream_options",
        "logit_bias",
        "logprobs",
        "top_p",
        "tools",
        "response_format",
        "user",
    )
    _post(front_end, "/v1/chat/completions", messages=_chat("x"), **dict.fromkeys(names))


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_usage_on_every_event(front_end: LiveFrontEnd, path: str):
    options = {"include_usage": True, "continuous_usage_stats": True}
    asked: dict[str, Any] = {"prompt": "hello"} if path == "/v1/completions" else {"messages": _chat("hello")}
    *events, last = _events(front_end, path, **asked, max_tokens=5, stream_options=options)
    counts = [event["usage"]["completion_tokens"] for event in events]
    num_tokens = last["usage"]["completion_tokens"]
    assert counts == list(range(0 if "messages" in asked else 1, num_tokens + 1)) and not last["choices"]
    assert {event["usage"]["prompt_tokens"] for event in events} == {last["usage"]["prompt_tokens"]}


def test_token_ids(front_end: LiveFrontEnd):
    body: dict[str, Any] = {
        "prompt": ["abc", "xy"],
        "max_tokens": 9,
        "return_token_ids": True,
        "logprobs": 1,
        "return_tokens_as_token_ids": True,
    }
    one, two = _post(front_end, "/v1/completions", **body)["choices"]
    assert (one["prompt_token_ids"], one["token_ids"]) == ([67, 68, 69], [67, 68, 69, 0]) and two["token_ids"] == [90, 91, 0]
    assert one["logprobs"]["tokens"] == ["token_id:67", "token_id:68", "token_id:69", "token_id:0"]
    streamed: dict[int, dict[str, list[int]]] = {0: {}, 1: {}}
    for choice in (event["choices"][0] for event in _events(front_end, "/v1/completions", **body)):
        for name in ("token_ids", "prompt_token_ids"):
            streamed[choice["index"]].setdefault(name, []).extend(choice.get(name, ()))
    assert streamed == {
        index: {name: choice[name] for name in ("token_ids", "prompt_token_ids")} for index, choice in enumerate((one, two))
    }
    chat = {"messages": _chat("hi"), "max_tokens": 3, "return_token_ids": True}
    answer, events = _post(front_end, "/v1/chat/completions", **chat), _events(front_end, "/v1/chat/completions", **chat)
    assert events[0]["prompt_token_ids"] == answer["prompt_token_ids"]
    assert [event["choices"][0]["token_ids"][0] for event in events[1:]] == answer["choices"][0]["token_ids"]


def test_best_of(front_end: LiveFrontEnd):
    """The double's samples are equally likely: the first are told, and all are counted."""
    body: dict[str, Any] = {"prompt": ["abc", "xyz"], "temperature": 1.0, "seed": 0, "best_of": 3, "echo": True}
    answer = _post(front_end, "/v1/completions", **body)
    assert [(choice["index"], choice["text"], choice["logprobs"]) for choice in answer["choices"]] == [
        (0, "abcabc", None),
        (1, "xyzxyz", None),
    ]
    assert answer["usage"]["completion_tokens"] == 24
    several = _post(front_end, "/v1/completions", **{**body, "n": 2, "echo": False})
    assert [choice["text"] for choice in several["choices"]] == ["abc", "bca", "xyz", "yzx"]


def test_best_is_the_highest_mean():
    def result(choice: int, *values: float) -> SampleResult:
        sample = Sample(choice, choice, None)  # type: ignore[arg-type]
        return SampleResult(sample, "", [SampleToken(sample, 1, "", "", TokenLogprobs(v, v, [], [], []), None) for v in values])

    results = [result(0, -1, -3), result(1, -1.5), result(2), result(3, -9), result(4, -1), result(5, -0.5, -2)]
    assert [result.sample.choice for result in best(results, 3, 2)] == [2, 1, 4, 5]


def test_truncated_prompts(front_end: LiveFrontEnd):
    assert _post(front_end, "/v1/completions", prompt="abcdef", truncate_prompt_tokens=2, echo=True)["choices"][0]["text"] == "efef"
    assert _post(front_end, "/v1/completions", prompt=[67, 68, 69], truncate_prompt_tokens=-1)["choices"][0]["text"] == "abc"
    long = _post(front_end, "/v1/completions", prompt="ab " * 3000, truncate_prompt_tokens=-1, max_tokens=1)
    assert long["usage"]["prompt_tokens"] == 2047
    assert _post(front_end, "/v1/chat/completions", messages=_chat("hello"), truncate_prompt_tokens=3)["usage"]["prompt_tokens"] == 3


def test_chat_echo(front_end: LiveFrontEnd):
    messages = [*_chat("count"), {"role": "assistant", "content": "one,"}]
    plain = _post(front_end, "/v1/chat/completions", messages=messages)["choices"][0]["message"]["content"]
    assert _post(front_end, "/v1/chat/completions", messages=messages, echo=True)["choices"][0]["message"]["content"] == "one," + plain
    events = _events(front_end, "/v1/chat/completions", messages=messages, echo=True)
    assert "".join(event["choices"][0]["delta"]["content"] for event in events) == "one," + plain
    assert not _post(front_end, "/v1/chat/completions", messages=_chat("x"), echo=True)["choices"][0]["message"]["content"].startswith("x")


def test_fields_that_change_nothing(front_end: LiveFrontEnd):
    ignored = {
        "metadata": {"a": "b"},
        "service_tier": "flex",
        "store": True,
        "safety_identifier": "x",
        "prompt_cache_key": "y",
        "priority": 0,
    }
    _post(front_end, "/v1/completions", prompt="a", **ignored, unheard_of={"x": 1})
    _post(
        front_end, "/v1/chat/completions", messages=_chat("a"), **ignored, verbosity="low", reasoning_effort="low", add_special_tokens=True
    )


def test_openai_sdk(front_end: LiveFrontEnd):
    with openai.OpenAI(base_url=front_end.url + "/v1", api_key="-", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["double"]
        answer = client.chat.completions.create(model="double", messages=[{"role": "user", "content": "hello"}], temperature=0)
        assert (answer.choices[0].message.content or "").startswith("user: hello")
        with client.chat.completions.create(
            model="tgi", messages=[{"role": "user", "content": "hello"}], stream=True, temperature=0, stream_options={"include_usage": True}
        ) as stream:
            chunks = list(stream)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == answer.choices[0].message.content
        assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == answer.usage.completion_tokens  # type: ignore[union-attr]
        completion = client.completions.create(model="double", prompt=["abc", "xyz"], temperature=0)
        assert [choice.text for choice in completion.choices] == ["abc", "xyz"]
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            client.chat.completions.create(model="gpt-4o", messages=[{"role": "user", "content": "x"}])
        with pytest.raises(openai.BadRequestError, match="temperature"):
            client.chat.completions.create(model="double", messages=[{"role": "user", "content": "x"}], temperature=-1)


def test_inference_client_chat(front_end: LiveFrontEnd, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # it would not even speak with this machine
    client = InferenceClient(base_url=front_end.url)
    answer = client.chat_completion([{"role": "user", "content": "hello"}], max_tokens=9, temperature=0)
    assert answer.choices[0].message.content == "user: hello\n"
    chunks = list(client.chat_completion([{"role": "user", "content": "hello"}], max_tokens=9, temperature=0, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "user: hello\n"


def test_generation_defaults_of_the_model(tmp_path_factory: pytest.TempPathFactory, front_end: LiveFrontEnd):
    engine = front_end.engine
    told = front_end.router.clients[0].info
    assert told is not None
    seen: list[Any] = []
    submit = engine.submit
    engine.submit = lambda request, sink: (seen.append(request.params), submit(request, sink))[1]
    try:
        front_end.router.clients[0].info = replace(told, defaults={"temperature": 0.6, "top_k": 20.0})
        front_end.client.post("/v1/completions", json={"prompt": "a"}).raise_for_status()
        front_end.client.post("/v1/completions", json={"prompt": "a", "temperature": 0.1, "top_k": 0}).raise_for_status()
        front_end.client.post("/generate", json={"inputs": "a", "parameters": {"do_sample": True}}).raise_for_status()
    finally:
        engine.submit = submit
        front_end.router.clients[0].info = told
    assert [(params.temperature, params.top_k) for params in seen] == [(0.6, 20), (0.1, 0), (1.0, 0)]
