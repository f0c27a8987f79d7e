"""Classes of attack that other servers were open to (docs: the project's survey of advisories), those that meet the front end.

Headers, slow clients and too many connections are in test_http_connections; fields out of bounds and keys in test_http_errors.
"""

import ast
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_front_end import LiveFrontEnd
from tiny_models import write_tokenizer

from jaxserve.http.auth import OPEN_PATHS, ApiKey

ROOT = Path(__file__).parent.parent / "jaxserve"
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveFrontEnd]:
    """A front end with a key, as Vertex AI would start it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AIP_PREDICT_ROUTE", "/vertex/predict")
        patch.setenv("AIP_HEALTH_ROUTE", "/vertex/health")
        live = LiveFrontEnd(folder, {"api_key": "secret"})
        live.start()
    yield live
    live.stop()


def _served(live: LiveFrontEnd, **headers: str) -> None:
    begin = time.monotonic()
    assert live.client.get("/health").status_code == 200 and time.monotonic() - begin < 5
    assert live.client.post("/generate", json={"inputs": "abc", "parameters": {}}, headers=headers).json() == {"generated_text": "abc"}


def test_nothing_is_unpickled_evaluated_or_run_in_a_shell() -> None:
    forbidden_modules = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_bytes())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names.append(node.module or "")
            assert not {name.split(".")[0] for name in names} & forbidden_modules, path
            if isinstance(node, ast.Call):
                assert not (isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec", "__import__")), f"{path}:{node.lineno}"
                assert not any(key.arg == "shell" and getattr(key.value, "value", None) is True for key in node.keywords), (
                    f"{path}:{node.lineno}"
                )


def test_the_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every comparison goes through hmac, with the whole key, whatever is wrong with what was sent."""
    from jaxserve.http import auth

    compared: list[tuple[bytes, bytes]] = []
    digest = auth.hmac.compare_digest
    monkeypatch.setattr(auth.hmac, "compare_digest", lambda one, other: (compared.append((one, other)), digest(one, other))[1])
    guard = ApiKey(lambda *_: None, "secret")  # type: ignore[arg-type,return-value]

    def allows(value: str) -> bool:
        return guard._allows({"type": "http", "method": "GET", "path": "/info", "headers": [(b"authorization", value.encode("latin-1"))]})

    assert allows("Bearer secret") and allows("bearer  secret ")
    for wrong in ("Bearer s", "Bearer secres", "Bearer " + "x" * 60_000, "Bearer \xff", "Bearer"):
        assert not allows(wrong)
    assert len(compared) == 7 and all(other == b"secret" for _, other in compared)


def test_platform_routes_ask_for_the_key_but_for_the_probe(guarded: LiveFrontEnd) -> None:
    body = {"instances": [{"inputs": "ab", "parameters": {}}]}
    assert guarded.client.post("/vertex/predict", json=body).status_code == 401
    assert guarded.client.post("/invocations", json={"inputs": "a"}).status_code == 401
    answer = guarded.client.post("/vertex/predict", json=body, headers={"authorization": "Bearer secret"})
    assert answer.json() == {"predictions": ["ab"]}
    assert guarded.client.get("/vertex/health").status_code == 200


@pytest.mark.parametrize(
    "path", ["//info", "/info/", "/INFO", "/%69nfo", "/health/../info", "/docs/../info", "/docs/static/../../info", "/chat/../info"]
)
def test_no_spelling_of_a_path_goes_past_the_key(guarded: LiveFrontEnd, path: str) -> None:
    with httpx.Client() as client:
        request = client.build_request("GET", guarded.url)
        request.url = request.url.copy_with(raw_path=path.encode())
        answer = client.send(request, follow_redirects=True)
    assert answer.status_code in (401, 404) and b"model_id" not in answer.content
    assert path not in OPEN_PATHS


def test_a_scraper_sends_the_key(guarded: LiveFrontEnd) -> None:
    assert guarded.client.get("/metrics").status_code == 401
    assert "jaxserve_requests_running" in guarded.client.get("/metrics", headers={"authorization": "Bearer secret"}).text


@pytest.mark.parametrize("path", ["/docs/static/../__init__.py", "/docs/static/%2e%2e/core.py", "/chat/..%2fapp.py", "/chat//etc/passwd"])
def test_static_files_are_no_way_to_others(front_end: LiveFrontEnd, path: str) -> None:
    with httpx.Client() as client:
        request = client.build_request("GET", front_end.url)
        request.url = request.url.copy_with(raw_path=path.encode())
        assert client.send(request).status_code in (404, 405)


def test_deep_json(front_end: LiveFrontEnd) -> None:
    for nested in ("[" * 50_000, "[" * 50_000 + "]" * 50_000, '{"a":' * 30_000 + "1" + "}" * 30_000):
        for path, field in (("/generate", "inputs"), ("/vertex", "instances"), ("/invocations", "inputs"), ("/chat_tokenize", "messages")):
            answer = front_end.client.post(path, content=f'{{"{field}": {nested}}}', headers=JSON)
            assert answer.status_code in (400, 422), path
    schema: Any = {"type": "integer"}
    for _ in range(90):
        schema = {"type": "array", "items": schema}
    answer = front_end.client.post("/generate", json={"inputs": "a", "parameters": {"grammar": {"type": "json", "value": schema}}})
    assert answer.status_code == 422
    _served(front_end)


def test_huge_lists_and_numbers(front_end: LiveFrontEnd) -> None:
    for parameters in (
        {"stop": ["x"] * 400_000},
        {"stop": ["x" * 1_000_000]},
        {"best_of": 2**31, "do_sample": True},
        {"top_n_tokens": 2**40},
        {"truncate": 2**70},
        {"seed": -1},
        {"top_k": 2**70},
        {"repetition_penalty": 1e300},
    ):
        answer = front_end.client.post("/generate", json={"inputs": "a", "parameters": parameters})
        assert answer.status_code == 422 and len(answer.content) < 500, parameters
    answer = front_end.client.post("/vertex", json={"instances": [{"inputs": "a"}] * 50_000})
    assert answer.status_code == 422
    huge = front_end.client.post("/generate", json={"inputs": "a", "parameters": {"max_new_tokens": 2**31 - 1}})
    assert huge.status_code == 200  # TGI's rule: it ends with the context
    _served(front_end)


def test_errors_tell_nothing_of_this_machine(front_end: LiveFrontEnd, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even an error that nobody expected: no path, no address, no line of code."""

    def fail(*arguments: Any, **options: Any) -> None:
        raise RuntimeError(f"secret {object()} in {__file__}")

    told = []
    with monkeypatch.context() as patch:
        patch.setattr(front_end.service, "answers", fail)
        for path, body in (
            ("/generate", {"inputs": "a"}),
            ("/v1/completions", {"prompt": "a"}),
            ("/vertex", {"instances": [{"inputs": "a"}]}),
            ("/invocations", {"prompt": "a"}),
        ):
            answer = front_end.client.post(path, json=body)
            assert answer.status_code == 500, path
            told.append(answer.text)
    told.append(front_end.client.post("/generate", content=b"\xff", headers=JSON).text)
    told.append(front_end.client.post("/generate", json={"inputs": 7}).text)
    for text in told:
        assert not re.search(r"0x[0-9a-f]{6}|/work|/home|/usr|\.py|Traceback|secret", text), text
        json.loads(text)
    _served(front_end)
