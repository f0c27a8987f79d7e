"""Routes that vLLM's users know."""

from typing import Any

import pytest
from live_front_end import LiveFrontEnd


def test_detokenize_and_version(front_end: LiveFrontEnd):
    client = front_end.client
    assert client.post("/detokenize", json={"tokens": [67, 68, 0]}).json() == {"prompt": "ab<|end|>"}
    assert client.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}
    assert client.post("/detokenize", json={"tokens": [320]}).status_code == 422
    assert set(client.get("/version").json()) == {"version"}


def test_tokenize(front_end: LiveFrontEnd):
    client = front_end.client
    told = client.post("/tokenize", json={"prompt": "hello", "return_token_strs": True}).json()
    assert told == {"count": 3, "max_model_len": 2048, "tokens": told["tokens"], "token_strs": ["he", "ll", "o"]}
    assert client.post("/detokenize", json={"tokens": told["tokens"]}).json() == {"prompt": "hello"}
    chat = client.post("/tokenize", json={"messages": [{"role": "user", "content": "x"}]}).json()
    text = client.post("/detokenize", json={"tokens": chat["tokens"]}).json()["prompt"]
    assert chat["token_strs"] is None and text.endswith("assistant: ")
    assert [token["text"] for token in client.post("/tokenize", json={"inputs": "hello"}).json()] == ["he", "ll", "o"]
    info = client.get("/tokenizer_info").json()
    assert (info["eos_token"], info["bos_token"]) == ("<|end|>", "<|begin|>") and "message" in info["chat_template"]


@pytest.mark.parametrize(
    ("body", "part"),
    [({"prompt": 7}, "`prompt`"), ({}, "`inputs`"), ({"messages": []}, "`messages`"), ({"messages": [{}]}, "`messages[0].role`")],
)
def test_bad_fields(front_end: LiveFrontEnd, body: dict[str, Any], part: str):
    response = front_end.client.post("/tokenize", json=body)
    assert response.status_code == 422 and part in response.json()["error"]
