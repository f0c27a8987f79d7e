"""TGI's routes, to the byte where TGI's clients rely on it."""

import json
import re
from typing import Any

import huggingface_hub.constants
import pytest
from huggingface_hub import InferenceClient
from live_front_end import LiveFrontEnd

from jaxserve.config import ServerOptions
from jaxserve.grammar import GrammarKind
from jaxserve.http.tgi_answers import GenerateResponse, SimpleToken, StreamResponse
from jaxserve.http.tgi_types import GenerateParameters, generate_task
from jaxserve.json_schema import read_schema


def _post(front_end: LiveFrontEnd, path: str, inputs: str, **parameters: Any) -> Any:
    response = front_end.client.post(path, json={"inputs": inputs, "parameters": parameters}, timeout=20)
    assert response.status_code == 200, response.text
    return response.json()


def test_generate(front_end: LiveFrontEnd):
    assert _post(front_end, "/generate", "hello") == {"generated_text": "hello"}
    details = _post(front_end, "/generate", "hello", details=True)["details"]
    assert details == {
        "finish_reason": "eos_token",
        "generated_tokens": 4,
        "seed": None,
        "prefill": [],
        "tokens": [
            {"id": 260, "text": "he", "logprob": -0.125, "special": False},
            {"id": 278, "text": "ll", "logprob": -0.125, "special": False},
            {"id": 81, "text": "o", "logprob": -0.125, "special": False},
            {"id": 0, "text": "<|end|>", "logprob": -0.125, "special": True},
        ],
    }


def test_top_tokens_and_prefill(front_end: LiveFrontEnd):
    details = _post(front_end, "/generate", "hello", decoder_input_details=True, top_n_tokens=2, max_new_tokens=1)["details"]
    assert details["finish_reason"] == "length"
    assert [token["text"] for token in details["prefill"]] == ["he", "ll", "o"]
    assert [token["logprob"] for token in details["prefill"]] == [None, -0.25, -0.25]
    assert [[top["logprob"] for top in each] for each in details["top_tokens"]] == [[-0.125, -0.625]]


def test_generate_stream_bytes(front_end: LiveFrontEnd):
    body = {"inputs": "ab", "parameters": {"details": True}}
    response = front_end.client.post("/generate_stream", json=body)
    assert response.text == (
        'data: {"index":1,"token":{"id":67,"text":"a","logprob":-0.125,"special":false},"generated_text":null,"details":null}\n\n'
        'data: {"index":2,"token":{"id":68,"text":"b","logprob":-0.125,"special":false},"generated_text":null,"details":null}\n\n'
        'data: {"index":3,"token":{"id":0,"text":"<|end|>","logprob":-0.125,"special":true},"generated_text":"ab",'
        '"details":{"finish_reason":"eos_token","generated_tokens":3,"seed":null,"input_length":2}}\n\n'
    )
    assert response.headers["x-compute-type"] == "1-double" and response.headers["x-compute-characters"] == "2"
    assert response.headers["x-accel-buffering"] == "no"


def test_root_answers_with_a_list_and_the_full_text(front_end: LiveFrontEnd):
    assert _post(front_end, "/", "ab") == [{"generated_text": "abab"}]
    assert _post(front_end, "/", "ab", return_full_text=False) == [{"generated_text": "ab"}]
    assert _post(front_end, "/generate", "ab", return_full_text=True) == {"generated_text": "abab"}
    streamed = front_end.client.post("/", json={"inputs": "ab", "stream": True, "parameters": {}})
    assert json.loads(streamed.text.split("\n\n")[-2].removeprefix("data: "))["generated_text"] == "abab"


def test_stop_string_is_kept(front_end: LiveFrontEnd):
    answer = _post(front_end, "/generate", "one two three", stop=["two"], details=True)
    assert answer["generated_text"] == "one two"
    assert answer["details"]["finish_reason"] == "stop_sequence"


def test_sampling_switches(front_end: LiveFrontEnd):
    """No parameters: sampling; parameters without do_sample: greedy; any warper: sampling. A seed is told only of what was sampled."""

    def seed(parameters: dict[str, Any] | None) -> Any:
        body: dict[str, Any] = {"inputs": "abc"}
        if parameters is not None:
            body["parameters"] = {"details": True, **parameters}
        return front_end.client.post("/generate", json=body).json()["details"]["seed"]

    assert seed({}) is None
    assert seed({"do_sample": True, "seed": 7}) == 7
    assert seed({"temperature": 0.5, "seed": 8}) == 8
    assert seed({"temperature": 1.0, "seed": 8}) is None
    assert 0 <= seed({"top_p": 0.5}) < 2**64
    drawn = {front_end.client.post("/generate", json={"inputs": "abcdefghijklmnop"}).json()["generated_text"] for _ in range(8)}
    assert len(drawn) > 1  # sampled with seeds of their own


def test_best_of(front_end: LiveFrontEnd):
    details = _post(front_end, "/generate", "abcdefgh", best_of=2, do_sample=True, details=True)["details"]
    (other,) = details["best_of_sequences"]
    assert other["generated_tokens"] == details["generated_tokens"] == 9 and "generated_text" in other
    assert other["seed"] != details["seed"]


def test_headers_count_the_best_candidate_alone(front_end: LiveFrontEnd):
    parameters = {"best_of": 2, "do_sample": True, "details": True, "max_new_tokens": 3}
    answer = front_end.client.post("/generate", json={"inputs": "abcdefgh", "parameters": parameters})
    prompt_tokens = front_end.client.post("/tokenize", json={"inputs": "abcdefgh"}).json()
    assert len(answer.json()["details"]["best_of_sequences"]) == 1
    assert (answer.headers["x-prompt-tokens"], answer.headers["x-generated-tokens"]) == (str(len(prompt_tokens)), "3")


def test_truncate_keeps_the_end(front_end: LiveFrontEnd):
    assert _post(front_end, "/generate", "abcdef", truncate=2) == {"generated_text": "ef"}


def test_huge_max_new_tokens_end_with_the_context(front_end: LiveFrontEnd):
    details = _post(front_end, "/generate", "abc", max_new_tokens=10**6, details=True)["details"]
    assert details["finish_reason"] == "eos_token"


def test_headers(front_end: LiveFrontEnd):
    response = front_end.client.post("/generate", json={"inputs": "hello"})
    for name in ("total-time", "validation-time", "queue-time", "inference-time", "time-per-token"):
        assert response.headers[f"x-{name}"].isdigit()
    assert re.fullmatch(r"\d+\.\d+", response.headers["x-compute-time"])
    told = {name: response.headers[f"x-{name}"] for name in ("prompt-tokens", "generated-tokens", "compute-characters")}
    assert told == {"prompt-tokens": "3", "generated-tokens": "4", "compute-characters": "5"}


def test_tokenize(front_end: LiveFrontEnd):
    spans = front_end.client.post("/tokenize", json={"inputs": "a hello"}).json()
    assert spans[0] == {"id": 67, "text": "a", "start": 0, "stop": 1}
    assert "".join(span["text"] for span in spans) == "a hello" and spans[-1]["stop"] == 7


def test_tokenize_keeps_the_end_with_truncate(front_end: LiveFrontEnd):
    body = {"inputs": "<|end|>a h\u00e9llo", "parameters": {"truncate": 2}}
    spans = front_end.client.post("/tokenize", json=body).json()
    whole = front_end.client.post("/tokenize", json={"inputs": body["inputs"]}).json()
    assert len(spans) == 2 and spans == whole[-2:]
    body["parameters"]["truncate"] = 0
    assert front_end.client.post("/tokenize", json=body).status_code == 422


def test_chat_tokenize(front_end: LiveFrontEnd):
    body = {"messages": [{"role": "user", "content": "hello"}], "model": "tgi"}
    told = front_end.client.post("/chat_tokenize", json=body).json()
    assert "hello" in told["templated_text"]
    covered = "".join(token["text"] for token in told["tokenize_response"])
    assert covered == told["templated_text"] and set(told["tokenize_response"][0]) == {"id", "text", "start", "stop"}


def test_invocations_dispatch_by_field(front_end: LiveFrontEnd):
    def ask(body: dict[str, Any]) -> Any:
        return front_end.client.post("/invocations", json=body)

    assert ask({"inputs": "ab", "parameters": {}}).json() == [{"generated_text": "abab"}]
    assert ask({"inputs": "ab", "parameters": {}, "stream": True}).text.startswith('data: {"index":1,')
    chat = ask({"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2})
    assert chat.json()["object"] == "chat.completion" and "x-total-time" in chat.headers
    assert ask({"prompt": "abc", "temperature": 0}).json()["choices"][0]["text"] == "abc"
    assert ask({"inputs": "", "parameters": {}}).json()["error"] == "Input validation error: `inputs` cannot be empty"
    assert ask({"prompt": "a", "n": -1}).json()["error"]["param"] == "n"  # in the other route's shape
    refused = ask({"text": "a"})
    assert refused.status_code == 422 and "`inputs`, `messages` or `prompt`" in refused.json()["error"]
    assert front_end.client.post("/invocations", content=b"{", headers={"content-type": "application/json"}).status_code == 400


def test_vertex(front_end: LiveFrontEnd):
    chat = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3, "temperature": 0}
    instances = [{"inputs": "abc", "parameters": {"max_new_tokens": 2}}, chat]
    told = front_end.client.post("/vertex", json={"instances": instances, "parameters": {"ignored": 1}}).json()
    assert told["predictions"][0] == "ab" and len(told["predictions"]) == 2 and told["predictions"][1]
    for instances in ([], [{"inputs": ""}], [{"inputs": "a"}] * 33, [{}]):
        refused = front_end.client.post("/vertex", json={"instances": instances})
        assert (refused.status_code, refused.json()["error_type"]) == (422, "validation")


def test_values_that_mean_off_are_taken(front_end: LiveFrontEnd):
    """TGI refuses them; see test_tgi_strict."""
    off = {"top_p": 1.0, "typical_p": 1.0, "top_k": 0, "temperature": 0.0, "details": True, "do_sample": True}
    details = _post(front_end, "/generate", "ab", **off)["details"]
    assert details["seed"] is None and [token["text"] for token in details["tokens"]] == ["a", "b", "<|end|>"]  # greedy
    assert front_end.client.post("/generate", json={"inputs": "ab", "parameters": None}).status_code == 200


def test_long_texts_do_not_hold_up_health(front_end: LiveFrontEnd):
    """A megabyte is refused by its characters, and what must be tokenized is tokenized beside the event loop."""
    service = front_end.service
    encoded: list[int] = []
    tokenizer = service.tokenizer
    with pytest.MonkeyPatch.context() as patch:
        encode = tokenizer._backend.encode_batch_fast  # type: ignore[union-attr]

        class Counting:
            def encode_batch_fast(self, texts: list[str], **options: Any) -> Any:
                encoded.append(len(texts[0]))
                return encode(texts, **options)

        patch.setattr(tokenizer, "_backend", Counting())
        for path, body in (
            ("/generate", {"inputs": "ab " * 300_000}),
            ("/v1/completions", {"prompt": "ab " * 300_000}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "ab " * 300_000}]}),
        ):
            assert front_end.client.post(path, json=body).status_code in (400, 422)
    assert encoded == []


def test_info_and_health(front_end: LiveFrontEnd):
    info = front_end.client.get("/info").json()
    assert (info["model_id"], info["max_total_tokens"], info["max_input_tokens"]) == ("double", 2048, 2047)
    assert info["deterministic"] is False
    assert (info["quantization"], info["weight_bytes"]) == (None, 0)
    for path in ("/", "/health", "/ping", "/health/live"):
        response = front_end.client.get(path)
        assert (response.status_code, response.content) == (200, b""), path


def test_inference_client_text_generation(front_end: LiveFrontEnd, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # it would not even speak with this machine
    client = InferenceClient(front_end.url)
    assert client.text_generation("hello", do_sample=False) == "hellohello"  # through POST /
    answer = client.text_generation("hello", details=True, do_sample=False, return_full_text=False)
    assert answer.details is not None and [token.text for token in answer.details.tokens] == ["he", "ll", "o", "<|end|>"]
    assert list(client.text_generation("hello", stream=True, do_sample=False)) == ["he", "ll", "o", "<|end|>"]


@pytest.mark.parametrize("path", ["/docs", "/openapi.json", "/api-doc/openapi.json", "/chat", "/chat/chat.js", "/chat/chat.css"])
def test_pages(front_end: LiveFrontEnd, path: str):
    assert front_end.client.get(path).status_code == 200


def test_docs_load_nothing_from_elsewhere(front_end: LiveFrontEnd):
    page = front_end.client.get("/docs").text
    links = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(links) >= 3 and all(link.startswith("/docs/static/") for link in links), links
    for link in links:
        assert front_end.client.get(link).status_code == 200


def test_chat_page_may_run_no_foreign_code(front_end: LiveFrontEnd):
    policy = front_end.client.get("/chat").headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'self'" in policy and "unsafe" not in policy


def test_openapi_describes_the_bodies(front_end: LiveFrontEnd):
    described = front_end.client.get("/openapi.json").json()
    fields = described["components"]["schemas"]["ChatBody"]["properties"]
    assert {"messages", "temperature", "stream_options", "top_k"} <= fields.keys()


def test_answers_are_as_described(front_end: LiveFrontEnd):
    def post(path: str, **fields: Any) -> Any:
        return front_end.client.post(path, json=fields)

    parameters = {"details": True, "decoder_input_details": True, "top_n_tokens": 2, "best_of": 2, "do_sample": True}
    GenerateResponse.model_validate(post("/generate", inputs="ab", parameters=parameters).json())
    for token in post("/tokenize", inputs="ab").json():
        SimpleToken.model_validate(token)
    events = post("/generate_stream", inputs="ab", parameters={"details": True, "top_n_tokens": 1}).text.split("\n\n")[:-1]
    for event in events:
        StreamResponse.model_validate_json(event.removeprefix("data: "))
    paths = front_end.client.get("/openapi.json").json()["paths"]
    described = {path: paths[path]["post"]["responses"]["200"]["content"] for path in ("/generate", "/generate_stream", "/", "/vertex")}
    assert {path: set(content) for path, content in described.items()} == {
        "/generate": {"application/json"},
        "/generate_stream": {"text/event-stream"},
        "/": {"application/json", "text/event-stream"},
        "/vertex": {"application/json"},
    }
    assert described["/generate"]["application/json"]["schema"]["$ref"].endswith("/GenerateResponse")


def test_grammars():
    """What TGI calls a grammar, as the engine is told it."""
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    for grammar, kind in (
        ({"type": "json", "value": schema}, GrammarKind.JSON_SCHEMA),
        ({"type": "json_object", "value": json.dumps(schema)}, GrammarKind.JSON_SCHEMA),
        ({"type": "json_schema", "value": {"name": "x", "schema": schema}}, GrammarKind.JSON_SCHEMA),
        ({"type": "regex", "value": "[0-9]+"}, GrammarKind.REGEX),
        ({"type": "json_object"}, GrammarKind.JSON_OBJECT),
    ):
        made = generate_task(GenerateParameters.model_validate({"grammar": grammar}), ServerOptions(), False).params[0].grammar
        assert made is not None and made.kind is kind
        if kind is GrammarKind.JSON_SCHEMA:
            assert json.loads(made.text) == read_schema(schema)


@pytest.mark.parametrize(
    ("path", "body", "characters"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "ab"}]}, None),
        ("/v1/completions", {"prompt": ["ab", "cde"]}, "5"),
        ("/v1/responses", {"input": "ab"}, None),
        ("/v1/messages", {"messages": [{"role": "user", "content": "ab"}], "max_tokens": 4}, None),
    ],
)
def test_streams_of_other_apis_have_the_headers_too(front_end: LiveFrontEnd, path: str, body: dict[str, Any], characters: str | None):
    headers = front_end.client.post(path, json={**body, "stream": True}).headers
    whole = front_end.client.post(path, json=body).headers["x-compute-characters"]
    assert (headers["x-compute-type"], headers["x-compute-characters"]) == ("1-double", characters or whole)
