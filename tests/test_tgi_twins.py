"""Every streamed answer of TGI's routes equals its unstreamed twin: text, tokens, log probabilities, counts, reasons."""

import json
import random
from typing import Any

import pytest
from live_front_end import LiveFrontEnd

WORDS = ("hello", "abc ", "two ", "\u00e9t\u00e9 ", "\u4e2d\u6587", "\U0001f600", " x", "\n", "one three")


def _request(seed: int) -> dict[str, Any]:
    draw = random.Random(seed)
    parameters: dict[str, Any] = {"details": True, "max_new_tokens": draw.randint(1, 40), "return_full_text": draw.random() < 0.3}
    if draw.random() < 0.6:
        parameters |= {"do_sample": True, "seed": draw.getrandbits(64), "temperature": draw.choice((0.3, 1.0, 1.7))}
    for name, value in (
        ("top_k", 5),
        ("top_p", 0.8),
        ("typical_p", 0.9),
        ("repetition_penalty", 1.2),
        ("truncate", 3),
        ("top_n_tokens", 2),
    ):
        if draw.random() < 0.3:
            parameters |= {name: value, "seed": parameters.get("seed", 1)}
    if draw.random() < 0.5:
        parameters["stop"] = draw.sample(("o t", "two", "\u4e2d", "\U0001f600", "b", "zz"), 2)
    return {"inputs": "".join(draw.choices(WORDS, k=draw.randint(1, 12))), "parameters": parameters}


@pytest.mark.parametrize("seed", range(40))
def test_twins(front_end: LiveFrontEnd, seed: int):
    body = _request(seed)
    whole = front_end.client.post("/generate", json=body).json()
    assert "details" in whole, whole
    streamed = front_end.client.post("/generate_stream", json=body).text
    events = [json.loads(event.removeprefix("data: ")) for event in streamed.split("\n\n") if event]
    assert [event["index"] for event in events] == list(range(1, len(events) + 1))
    assert [event["token"] for event in events] == whole["details"]["tokens"]
    assert [event.get("top_tokens") for event in events] == whole["details"].get("top_tokens", [None] * len(events))
    assert all(event["generated_text"] is event["details"] is None for event in events[:-1])
    last = events[-1]
    assert last["generated_text"] == whole["generated_text"]
    told = {name: whole["details"][name] for name in ("finish_reason", "generated_tokens", "seed")}
    assert {name: last["details"][name] for name in told} == told
    assert front_end.client.post("/", json={**body, "stream": False}).json()[0] == whole
