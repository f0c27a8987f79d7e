"""What is wrong with a request is told with a 4xx that names the field; nothing makes a 5xx or a hang, and the next request is served."""

import gzip
import json
from typing import Any

import pytest
from live_front_end import LiveFrontEnd

from jaxserve.errors import InvalidRequest
from jaxserve.http.errors import tgi_error

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "hello"}]
TOOL = {"type": "function", "function": {"name": "f"}}


def _served(front_end: LiveFrontEnd) -> None:
    """The next request is answered."""
    answer = front_end.client.post(COMPLETIONS, json={"prompt": "abc", "temperature": 0}, timeout=5)
    assert answer.json()["choices"][0]["text"] == "abc"


def _refused(front_end: LiveFrontEnd, path: str, content: bytes | str | dict[str, Any], status: int) -> dict[str, Any]:
    if isinstance(content, dict):
        content = json.dumps(content)
    response = front_end.client.post(path, content=content, headers={"content-type": "application/json"}, timeout=20)
    assert response.status_code == status, response.text
    _served(front_end)
    return response.json()


# Fields of vLLM and SGLang that would change the answer.
NOT_YET = (
    "allowed_token_ids", "bad_words", "logits_processors", "custom_logit_processor", "flat_logprobs", "input_ids", "logprob_token_ids",
    "lora_path", "prompt_embeds", "repetition_detection", "return_hidden_states", "separate_reasoning", "session_params", "stop_regex",
    "thinking_token_budget", "watermarking",
)  # fmt: skip
OPENAI_BAD: list[tuple[str, dict[str, Any], str | None, str]] = [
    # path, fields, the field that is named, a part of the message
    (CHAT, {"messages": None}, "messages", "messages"),
    (CHAT, {"messages": []}, "messages", "messages"),
    (CHAT, {"messages": "hello"}, "messages", "list"),
    (CHAT, {"messages": [7]}, "messages[0]", "messages[0]"),
    (CHAT, {"messages": [{"content": "x"}]}, "messages[0].role", "required"),
    (CHAT, {"messages": [{"role": "user", "content": 7}]}, "messages[0].content", "string"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]},
     "messages[0].content", "image_url"),
    (CHAT, {"temperature": "hot"}, "temperature", "number"),
    (CHAT, {"temperature": -0.1}, "temperature", "temperature"),
    (CHAT, {"temperature": True}, "temperature", "number"),
    (CHAT, {"temperature": 1e300}, "temperature", "temperature"),
    (CHAT, {"top_p": 0}, "top_p", "top_p"),
    (CHAT, {"top_p": 1.5}, "top_p", "top_p"),
    (CHAT, {"top_k": -2}, "top_k", "top_k"),
    (CHAT, {"top_k": 2**70}, "top_k", "top_k"),
    (CHAT, {"max_tokens": 0}, "max_tokens", "max_tokens"),
    (CHAT, {"max_tokens": -1}, "max_tokens", "max_tokens"),
    (CHAT, {"max_tokens": 2**63}, "max_tokens", "max_tokens"),
    (CHAT, {"max_tokens": 10.5}, "max_tokens", "integer"),
    (CHAT, {"max_tokens": "10"}, "max_tokens", "integer"),
    (CHAT, {"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "max_completion_tokens"),
    (CHAT, {"max_tokens": 5000}, "max_tokens", "2048"),
    (CHAT, {"n": 0}, "n", "n"),
    (CHAT, {"messages": [{"role": "alien", "content": "a"}]}, "messages", "alien"),
    (COMPLETIONS, {"prompt": ["a"] * 9, "n": 128}, "n", "1024"),
    (CHAT, {"n": 10**6}, "n", "128"),
    (CHAT, {"seed": 2**64}, "seed", "seed"),
    (CHAT, {"seed": 0.5}, "seed", "integer"),
    (CHAT, {"stop": ["x"] * 1000}, "stop", "16"),
    (CHAT, {"stop": ["x" * 100000]}, "stop", "1000"),
    (CHAT, {"stop": [""]}, "stop", "empty"),
    (CHAT, {"stop": [1]}, "stop[0]", "string"),
    (CHAT, {"stop": {}}, "stop", "list"),
    (CHAT, {"presence_penalty": 2.5}, "presence_penalty", "penalty"),
    (CHAT, {"repetition_penalty": 0}, "repetition_penalty", "penalty"),
    (CHAT, {"min_p": -1}, "min_p", "min_p"),
    (CHAT, {"min_tokens": -1}, "min_tokens", "min_tokens"),
    (CHAT, {"min_tokens": 9, "max_tokens": 8}, "min_tokens", "min_tokens"),
    (CHAT, {"logit_bias": {"x": 1}}, "logit_bias", "token ids"),
    (CHAT, {"logit_bias": {"5": 101}}, "logit_bias", "100"),
    (CHAT, {"logit_bias": {"320": 1}}, "logit_bias", "319"),
    (CHAT, {"logit_bias": {str(n): 1 for n in range(2000)}}, "logit_bias", "1024"),
    (CHAT, {"logit_bias": [1]}, "logit_bias", "dict"),
    (CHAT, {"stop_token_ids": [320]}, "stop_token_ids", "319"),
    (CHAT, {"stop_token_ids": list(range(300))}, "stop_token_ids", "64"),
    (CHAT, {"top_logprobs": 2}, "top_logprobs", "logprobs"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
    (CHAT, {"logprobs": True, "top_logprobs": -1}, "top_logprobs", "20"),
    (CHAT, {"stream": "yes"}, "stream", "boolean"),
    (CHAT, {"stream_options": {"include_usage": True}}, "stream_options", "stream"),
    (CHAT, {"tools": [{"type": "function"}]}, "tools[0].function", "required"),
    (CHAT, {"tools": [{"type": "web_search"}]}, "tools[0].type", "function"),
    (CHAT, {"tools": [{"type": "function", "function": {"name": ""}}]}, "tools[0].function.name", "1"),
    (CHAT, {"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]}, "tools[0].function.parameters", "dict"),
    (CHAT, {"tool_choice": "required"}, "tool_choice", "tools"),
    (CHAT, {"tools": [TOOL], "tool_choice": "sometimes"}, "tool_choice", "none of"),
    (CHAT, {"tools": [TOOL], "tool_choice": {"type": "allowed_tools"}}, "tool_choice", "of type `allowed_tools` is not supported"),
    (CHAT, {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice", "none of"),
    (CHAT, {"tools": [TOOL], "tool_choice": "required", "response_format": {"type": "json_object"}}, "response_format", "exclude"),
    (CHAT, {"tools": [TOOL] * 600}, "tools", "512"),
    (CHAT, {"messages": [{"role": "assistant", "tool_calls": [{"type": "function"}]}]}, "messages[0].tool_calls[0].function", "required"),
    (CHAT, {"messages": [{"role": "user", "content": "x", "function_call": {"name": "f"}}]}, "messages[0].function_call", "not supported"),
    (CHAT, {"response_format": {"type": "xml"}}, "response_format.type", "json_object"),
    (CHAT, {"response_format": {"type": "json_schema"}}, "response_format.json_schema", "required"),
    (CHAT, {"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex", "exclude"),
    (CHAT, {"guided_json": 5}, "guided_json", "dict"),
    (CHAT, {"guided_json": "{"}, "guided_json", "JSON"),
    (CHAT, {"guided_choice": []}, "guided_choice", "guided_choice"),
    (CHAT, {"structured_outputs": {"regex": ""}}, "structured_outputs.regex", "empty"),
    (CHAT, {"structured_outputs": {"structural_tag": "{"}}, "structured_outputs.structural_tag", "JSON"),
    (CHAT, {"structured_outputs": {"json_object": True, "whitespace_pattern": 1}}, "structured_outputs.whitespace_pattern", "string"),
    (
        CHAT,
        {"structured_outputs": {"json_object": True, "disable_any_whitespace": True}, "guided_whitespace_pattern": " "},
        "guided_whitespace_pattern",
        "exclude",
    ),
    (
        CHAT,
        {
            "structured_outputs": {"disable_any_whitespace": True},
            "response_format": {
                "type": "structural_tag",
                "structures": [{"begin": "<f>", "schema": {}, "end": "</f>"}],
                "triggers": ["<f>"],
            },
        },
        "structured_outputs.disable_any_whitespace",
        "structural tags",
    ),
    (CHAT, {"regex": "a", "ebnf": "b"}, "ebnf", "exclude"),
    (CHAT, {"priority": 1}, "priority", "order"),
    (CHAT, {"detokenize": False}, "detokenize", "other than True is not supported"),
    (COMPLETIONS, {"prompt": "a", "truncation_side": "right"}, "truncation_side", "other than left is not supported"),
    *((CHAT, {name: ["x"]}, name, "not supported") for name in NOT_YET),
    (CHAT, {"truncate_prompt_tokens": -2}, "truncate_prompt_tokens", "-1"),
    (CHAT, {"truncate_prompt_tokens": 5000}, "truncate_prompt_tokens", "2047"),
    (CHAT, {"truncate_prompt_tokens": 0}, "prompt", "at least one"),
    (CHAT, {"functions": [{"name": "f"}]}, "functions", "not supported"),
    (CHAT, {"chat_template": "{{ x }}"}, "chat_template", "not supported"),
    (CHAT, {"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs", "tokenize"),
    (CHAT, {"chat_template_kwargs": {"enable_thinking": [1]}}, "chat_template_kwargs", "enable_thinking"),
    (CHAT, {"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message", "exclude"),
    (CHAT, {"cache_salt": "x" * 1000}, "cache_salt", "256"),
    (CHAT, {"model": 7}, "model", "string"),
    (CHAT, {"messages": [{"role": "user", "content": "ab " * 3000}]}, "prompt", "2047"),
    (COMPLETIONS, {"prompt": None}, "prompt", "prompt"),
    (COMPLETIONS, {"prompt": ""}, "prompt", "at least one token"),
    (COMPLETIONS, {"prompt": []}, "prompt", "empty"),
    (COMPLETIONS, {"prompt": [[]]}, "prompt", "empty"),
    (COMPLETIONS, {"prompt": {}}, "prompt", "string"),
    (COMPLETIONS, {"prompt": [1, "a"]}, "prompt", "token ids"),
    (COMPLETIONS, {"prompt": [320]}, "prompt", "320"),
    (COMPLETIONS, {"prompt": [-1]}, "prompt", "vocabulary"),
    (COMPLETIONS, {"prompt": [2**80]}, "prompt", "vocabulary"),
    (COMPLETIONS, {"prompt": [True]}, "prompt", "token ids"),
    (COMPLETIONS, {"prompt": ["a"] * 33}, "prompt", "32"),
    (COMPLETIONS, {"prompt": "ab " * 333333}, "prompt", "2047"),
    (COMPLETIONS, {"prompt": [5] * 300000}, "prompt", "2047"),
    (COMPLETIONS, {"prompt": "a", "logprobs": 21}, "logprobs", "20"),
    (COMPLETIONS, {"prompt": "a", "best_of": 2, "n": 3}, "best_of", "best_of"),
    (COMPLETIONS, {"prompt": "a", "best_of": 129}, "best_of", "128"),
    (COMPLETIONS, {"prompt": "a", "best_of": 3, "stream": True}, "best_of", "streamed"),
    ("/v1/embeddings", {"input": "a"}, "model", "no embeddings"),
    (COMPLETIONS, {"prompt": "a", "suffix": "b"}, "suffix", "not supported"),
    (COMPLETIONS, {"prompt": "a", "echo": True, "max_tokens": 0, "stream": True}, "max_tokens", "streamed"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": 0}, "max_tokens", ">= 1"),
    (COMPLETIONS, {"prompt": "a", "prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "streamed"),
    (CHAT, {"prompt_logprobs": -1, "stream": False}, "prompt_logprobs", ">= 0"),
]  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "fields", "param", "part"), OPENAI_BAD, ids=lambda value: str(value)[:40])
def test_openai_bad_fields(front_end: LiveFrontEnd, path: str, fields: dict[str, Any], param: str | None, part: str, stream: bool):
    if "stream" in fields or "stream_options" in fields:
        stream = False
    body = {**({"messages": MESSAGES} if path == CHAT else {}), **({"stream": True} if stream else {}), **fields}
    error = _refused(front_end, path, body, 400)["error"]
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert part in error["message"] and len(error["message"]) < 500


def test_context_length_has_a_code(front_end: LiveFrontEnd):
    assert _refused(front_end, COMPLETIONS, {"prompt": "a", "max_tokens": 2048}, 400)["error"]["code"] == "context_length_exceeded"


def test_unknown_model(front_end: LiveFrontEnd):
    error = _refused(front_end, CHAT, {"messages": MESSAGES, "model": "gpt-4"}, 404)["error"]
    assert (error["param"], error["code"]) == ("model", "model_not_found")


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b'{"prompt": "a"', b"nonsense", b'{"prompt": "a", "temperature": NaN}', b'{"prompt": "a", "temperature": Infinity}',
        b'{"prompt": "a", "temperature": -Infinity}', b"\xff\xfe", b'{"prompt": "\\ud800"}', b"[" * 100000,
        b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}", b'{"prompt": "a", "seed": ' + b"9" * 100000 + b"}",
    ],
    ids=lambda content: repr(content[:40]),
)  # fmt: skip
@pytest.mark.parametrize("path", [COMPLETIONS, "/generate", "/"])
def test_what_is_not_json(front_end: LiveFrontEnd, content: bytes, path: str):
    status = 422 if content == b"" and not path.startswith("/v1") else 400  # no body at all is a missing one
    told = _refused(front_end, path, content, status)
    assert ("message" in told["error"]) if path.startswith("/v1") else told["error_type"] == "validation"


@pytest.mark.parametrize("content", [b"[]", b"7", b'"x"', b"null"])
def test_bodies_that_are_no_object(front_end: LiveFrontEnd, content: bytes):
    _refused(front_end, COMPLETIONS, content, 400)
    _refused(front_end, "/generate", content, 422)


def test_infinity_by_overflow(front_end: LiveFrontEnd):
    _refused(front_end, COMPLETIONS, '{"prompt": "a", "temperature": 1e999}', 400)
    _refused(front_end, COMPLETIONS, '{"prompt": "a", "logit_bias": {"5": 1e999}}', 400)
    _refused(front_end, "/generate", '{"inputs": "a", "parameters": {"temperature": 1e999}}', 422)


def test_content_type(front_end: LiveFrontEnd):
    response = front_end.client.post(COMPLETIONS, content=b'{"prompt": "a"}')
    assert response.status_code == 415 and "application/json" in response.json()["error"]["message"]
    response = front_end.client.post("/generate", data={"inputs": "a"})
    assert (response.status_code, response.json()["error_type"]) == (415, "validation")
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    response = front_end.client.post(COMPLETIONS, content=gzip.compress(b'{"prompt": "a"}'), headers=headers)
    assert response.status_code == 415 and "gzip" in response.json()["error"]["message"]


def test_body_over_the_limit(front_end: LiveFrontEnd):
    body = b'{"prompt": "' + b"a" * 2_000_001 + b'"}'
    assert "message" in _refused(front_end, COMPLETIONS, body, 413)["error"]
    assert _refused(front_end, "/generate", body, 413)["error_type"] == "validation"

    def chunks() -> Any:
        for _ in range(40):
            yield b" " * 100_000

    assert front_end.client.post(COMPLETIONS, content=chunks(), headers={"content-type": "application/json"}).status_code == 413


def test_unknown_paths_and_methods(front_end: LiveFrontEnd):
    assert front_end.client.get("/v1/nothing").json()["error"]["type"] == "invalid_request_error"
    assert front_end.client.get("/nothing").json() == {"error": "Not Found", "error_type": "not_found"}
    assert front_end.client.get("/v1/completions").status_code == 405
    wrong = front_end.client.get("/generate")
    assert (wrong.status_code, wrong.json()["error_type"], wrong.headers["allow"]) == (405, "method_not_allowed", "POST")


TGI_BAD: list[tuple[dict[str, Any], str]] = [
    ({"best_of": 0}, "`best_of` must be > 0 and <= 2. Given: 0"),
    ({"best_of": 3, "do_sample": True}, "`best_of` must be > 0 and <= 2. Given: 3"),
    ({"best_of": 2}, "you must use sampling when `best_of` is > 1"),
    ({"best_of": 2, "do_sample": True, "seed": 1}, "`seed` must not be set when `best_of` > 1"),
    ({"temperature": -0.1}, "`temperature` must be positive"),
    ({"temperature": 0.0, "best_of": 2}, "you must use sampling when `best_of` is > 1"),
    ({"repetition_penalty": 0.0}, "`repetition_penalty` must be strictly positive"),
    ({"frequency_penalty": 2.1}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
    ({"top_p": 1.1}, "`top_p` must be > 0.0 and <= 1.0"),
    ({"typical_p": 0.0}, "`typical_p` must be > 0.0 and <= 1.0"),
    ({"top_k": -1}, "`top_k` must be positive"),
    ({"truncate": 0}, "`truncate` must be strictly positive and less than 2047. Given: 0"),
    ({"truncate": 2048}, "`truncate` must be strictly positive and less than 2047. Given: 2048"),
    ({"max_new_tokens": 0}, "`max_new_tokens` must be strictly positive"),
    ({"stop": ["x"] * 17}, "`stop` supports up to 16 stop sequences. Given: 17"),
    ({"top_n_tokens": 21}, "`top_n_tokens` must be >= 0 and <= 20. Given: 21"),
    ({"grammar": {"type": "regex", "value": ""}}, "grammar is not valid: `grammar` must be a string that is not empty"),
    ({"grammar": {"type": "regex", "value": {}}}, "grammar is not valid: the value of a regex must be a string"),
    ({"grammar": {"type": "json", "value": 7}}, "grammar is not valid: the value must be a JSON schema"),
    ({"grammar": {"type": "json", "value": "{"}}, "grammar is not valid: `grammar` is not valid JSON"),
    ({"grammar": {"type": "json_schema", "value": {"name": "x"}}}, "grammar is not valid: the value of a json_schema must have a `schema`"),
    ({"adapter_id": "x"}, "`adapter_id` is not supported yet"),
]


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/"])
@pytest.mark.parametrize(("parameters", "message"), TGI_BAD, ids=lambda value: str(value)[:40])
def test_tgi_messages(front_end: LiveFrontEnd, path: str, parameters: dict[str, Any], message: str):
    told = _refused(front_end, path, {"inputs": "abc", "parameters": parameters}, 422)
    if path == "/generate_stream" and parameters.get("best_of", 1) == 2:
        message = "`best_of` != 1 is not supported when streaming tokens"
    assert told["error_type"] == "validation" and told["error"].startswith(f"Input validation error: {message}")


def test_a_grammar_that_the_engine_refuses_is_told_in_tgis_words():
    status, told = tgi_error(InvalidRequest("`grammar`: the grammar cannot be compiled: why", "grammar"))
    assert (status, told["error"]) == (422, "Input validation error: grammar is not valid: the grammar cannot be compiled: why")


def test_tgi_input_messages(front_end: LiveFrontEnd):
    def message(path: str, body: dict[str, Any]) -> str:
        return _refused(front_end, path, body, 422)["error"].removeprefix("Input validation error: ")

    assert message("/generate", {"inputs": ""}) == "`inputs` cannot be empty"
    assert message("/tokenize", {"inputs": ""}) == "`inputs` cannot be empty"
    assert message("/generate", {"inputs": "z" * 2100}) == "`inputs` must have less than 2047 tokens. Given: 2100"
    assert message("/generate", {"inputs": "z" * 100_000}).startswith("`inputs` must have less than 2047 tokens. Given: at least ")
    assert message("/generate", {"inputs": "z" * 2040, "parameters": {"max_new_tokens": 9}}) == (
        "`inputs` tokens + `max_new_tokens` must be <= 2048. Given: 2040 `inputs` tokens and 9 `max_new_tokens`"
    )
    assert message("/generate_stream", {"inputs": "a", "parameters": {"decoder_input_details": True}}) == (
        "`decoder_input_details` == true is not supported when streaming tokens"
    )
    assert "inputs" in message("/generate", {"parameters": {}})
    assert "parameters.temperature" in message("/generate", {"inputs": "a", "parameters": {"temperature": "x"}})
    assert "parameters" in message("/generate", {"inputs": "a", "parameters": 7})


def test_failed_generation(front_end: LiveFrontEnd):
    front_end.engine.fail_token_id = 299
    text_ids = [70, 71, 72, 73, 299]
    answer = front_end.client.post(COMPLETIONS, json={"prompt": text_ids, "temperature": 0})
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "generation_failed")
    text = front_end.service.tokenizer.decode(text_ids)
    if front_end.service.tokenizer.encode(text)[-1] == 299:
        answer = front_end.client.post("/generate", json={"inputs": text, "parameters": {}})
        assert answer.status_code == 424
        assert answer.json() == {"error": "Request failed during generation: the step failed", "error_type": "generation"}
        streamed = front_end.client.post("/generate_stream", json={"inputs": text, "parameters": {}})
        assert json.loads(streamed.text.split("\n\n")[-2].removeprefix("data: "))["error_type"] == "generation"
    streamed = front_end.client.post(COMPLETIONS, json={"prompt": text_ids, "temperature": 0, "stream": True})
    *_, error, done, rest = streamed.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "generation_failed"
    _served(front_end)


def test_overload(front_end: LiveFrontEnd):
    front_end.engine.max_concurrent_requests = 0
    try:
        for path, body in (
            (COMPLETIONS, {"prompt": "a"}),
            (COMPLETIONS, {"prompt": "a", "stream": True}),
            ("/generate", {"inputs": "a"}),
            ("/generate_stream", {"inputs": "a"}),
        ):
            response = front_end.client.post(path, json=body)
            assert (response.status_code, response.headers["retry-after"]) == (429, "1"), path
            if not path.startswith("/v1"):
                assert response.json() == {"error": "Model is overloaded", "error_type": "overloaded"}
    finally:
        front_end.engine.max_concurrent_requests = 1024
    _served(front_end)


def test_api_key(front_end: LiveFrontEnd):
    """The key guards every route but the open ones, whatever the routes are."""
    from fastapi.testclient import TestClient
    from starlette.routing import Route

    from jaxserve.config import ServerOptions
    from jaxserve.http.app import build_app
    from jaxserve.http.service import Service

    service = Service(front_end.router, front_end.service.metrics, ServerOptions(api_key="secret"))
    app = build_app(service)
    client = TestClient(app, raise_server_exceptions=False)
    described = app.openapi()["paths"]
    open_paths = {"/", "/ping", "/health", "/health/live", "/health/ready", "/chat", "/chat/chat.css", "/chat/chat.js"}
    routes = [(method.upper(), path) for path, methods in described.items() for method in methods]
    assert len(routes) > 12
    mounted = {("GET", route.path) for route in app.routes if isinstance(route, Route)}  # those that the description leaves out
    assert {("GET", "/metrics"), ("GET", "/docs"), ("GET", "/openapi.json"), ("GET", "/api-doc/openapi.json")} <= {*routes, *mounted}
    more = [("GET", path) for path in (*open_paths, "/chat/other", "/docs/static/swagger-ui.css", "/nothing", "/health/other")]
    for method, path in {*routes, *mounted, *more}:
        status = client.request(method, path).status_code
        assert (status == 401) == (method != "GET" or path not in open_paths), (method, path, status)
    for wrong in ("", "Bearer", "Bearer Secret", "Bearer secret2", "Basic secret", "secret"):
        assert client.get("/v1/models", headers={"authorization": wrong}).status_code == 401
    assert client.get("/v1/models").json()["error"]["code"] == "invalid_api_key"
    assert client.get("/info").content == b""
    for path in ("/v1/models", "/metrics", "/docs", "/openapi.json", "/docs/static/swagger-ui.css"):
        assert client.get(path, headers={"authorization": "Bearer secret"}).status_code == 200, path


def test_cors(front_end: LiveFrontEnd):
    response = front_end.client.options(
        CHAT,
        headers={"origin": "http://x", "access-control-request-method": "POST", "access-control-request-headers": "content-type"},
    )
    assert response.status_code == 200 and response.headers["access-control-allow-origin"] == "*"
