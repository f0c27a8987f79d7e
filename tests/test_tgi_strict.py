"""--tgi-strict: what TGI does where jaxserve does better by default."""

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from live_front_end import LiveFrontEnd
from tiny_models import write_tokenizer


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveFrontEnd]:
    """A front end with --tgi-strict and a key."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    live = LiveFrontEnd(folder, {"tgi_strict": True, "api_key": "k"})
    live.client.headers["authorization"] = "Bearer k"
    live.start()
    yield live
    live.stop()


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"temperature": 0.0}, "`temperature` must be strictly positive"),
        ({"top_k": 0}, "`top_k` must be strictly positive"),
        ({"top_p": 1.0}, "`top_p` must be > 0.0 and < 1.0"),
        ({"typical_p": 1.0}, "`typical_p` must be > 0.0 and < 1.0"),
        ({"grammar": {"type": "json", "value": {"type": "string"}}}, "grammar is not valid: Grammar must have a 'properties' field"),
        ({"grammar": {"type": "json", "value": True}}, "grammar is not valid: Grammar must have a 'properties' field"),
    ],
)
def test_values_that_mean_off_are_refused(strict: LiveFrontEnd, parameters: dict[str, Any], message: str):
    told = strict.client.post("/generate", json={"inputs": "a", "parameters": parameters})
    assert (told.status_code, told.json()) == (422, {"error": f"Input validation error: {message}", "error_type": "validation"})


def test_streams_tell_every_error_as_an_event(strict: LiveFrontEnd, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO", "jaxserve.http.request_record")
    for path, fields in (("/generate_stream", {}), ("/", {"stream": True})):
        told = strict.client.post(path, json={"inputs": "", **fields})
        assert told.status_code == 200 and told.headers["content-type"].startswith("text/event-stream")
        assert told.text == 'data: {"error": "Input validation error: `inputs` cannot be empty", "error_type": "validation"}\n\n'
    deadline = time.monotonic() + 10  # a line is written when the answer is, and may come a little later
    while len(lines := [record for record in caplog.records if record.name.endswith("request_record")]) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for line in lines:
        assert line.__dict__["request"].items() >= {"outcome": "refused", "error": "`inputs` cannot be empty"}.items()
    strict.engine.max_concurrent_requests = 0
    try:
        told = strict.client.post("/generate_stream", json={"inputs": "a"})
    finally:
        strict.engine.max_concurrent_requests = 1024
    assert told.status_code == 200 and json.loads(told.text.removeprefix("data: "))["error_type"] == "overloaded"


def test_bodies_that_do_not_fit_are_told_in_plain_text(strict: LiveFrontEnd):
    def post(content: bytes, kind: str = "application/json") -> tuple[int, str, str]:
        told = strict.client.post("/generate", content=content, headers={"content-type": kind})
        return told.status_code, told.headers["content-type"].partition(";")[0], told.text

    assert post(b"{")[:2] == (400, "text/plain")
    assert post(b"{}")[:2] == (422, "text/plain")
    assert post(b"{}")[2].startswith("Failed to deserialize the JSON body into the target type: ")
    assert post(b"{}", "text/plain") == (415, "text/plain", "Expected request with `Content-Type: application/json`")
    assert post(b'{"inputs": "' + b"a" * 2_000_001)[0] == 413


def test_openai_routes_answer_in_tgis_shape(strict: LiveFrontEnd):
    told = strict.client.post("/v1/completions", json={"prompt": "a", "temperature": -1}).json()
    assert told["error_type"] == "validation" and told["error"].startswith("Input validation error: ")


def test_any_model_is_the_one_that_is_served(strict: LiveFrontEnd):
    def told(path: str, **fields: Any) -> Any:
        answer = strict.client.post(path, json=fields)
        assert answer.status_code == 200, answer.text
        return answer

    served = strict.client.get("/v1/models").json()["data"][0]["id"]
    chat: dict[str, Any] = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
    assert told("/v1/chat/completions", model="my-adapter", **chat).json()["model"] == "my-adapter"
    assert '"model":"my-adapter"' in told("/v1/chat/completions", model="my-adapter", stream=True, **chat).text
    assert told("/v1/chat/completions", model="tgi", **chat).json()["model"] == served
    assert told("/v1/completions", model="my-adapter", prompt="a", max_tokens=1).json()["model"] == served


def test_completions_go_on_to_the_end_of_the_context(strict: LiveFrontEnd):
    told = strict.client.post("/v1/completions", json={"prompt": "z" * 40, "temperature": 0}).json()
    assert (told["choices"][0]["finish_reason"], told["usage"]["completion_tokens"]) == ("stop", 41)  # the double repeats the prompt
    told = strict.client.post("/v1/completions", json={"prompt": "z" * 40, "temperature": 0, "max_tokens": 3}).json()
    assert told["usage"]["completion_tokens"] == 3


def test_open_routes(strict: LiveFrontEnd):
    from httpx import Client

    with Client(base_url=strict.url) as client:
        for path in ("/info", "/v1/models", "/metrics", "/docs", "/openapi.json", "/api-doc/openapi.json"):
            assert client.get(path).status_code == 200, path
        body = {"messages": [{"role": "user", "content": "a"}]}
        assert client.post("/chat_tokenize", json=body).status_code == 200
        assert client.post("/tokenize", json={"inputs": "a"}).status_code == 401
