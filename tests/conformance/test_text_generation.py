"""TGI's Python client, text-generation 0.7.0, against the real server."""

import asyncio
import json
import re
from types import ModuleType
from typing import Any

import pytest

pytestmark = [
    pytest.mark.demo,
    # The client's own: it was written for an earlier pydantic.
    pytest.mark.filterwarnings("ignore:The `dict` method is deprecated"),
]
PROMPT = "The capital of France is"


@pytest.fixture
def client(text_generation: ModuleType, server_url: str) -> Any:
    return text_generation.Client(server_url, timeout=60)


def test_generate(client: Any):
    answer = client.generate(PROMPT, max_new_tokens=5, decoder_input_details=True)
    details = answer.details
    assert answer.generated_text.startswith(" Paris")
    assert (details.finish_reason.value, details.generated_tokens, details.seed) == ("length", 5, None)
    assert "".join(token.text for token in details.prefill) == PROMPT
    first, *others = [token.logprob for token in details.prefill]
    assert first is None and all(logprob < 0 for logprob in others)
    # What it answers is as likely as a part of the next prompt (a greedy answer's distribution is the model's own).
    again = client.generate(PROMPT + answer.generated_text, max_new_tokens=1, decoder_input_details=True).details.prefill
    tokens = details.tokens[: len(again) - len(details.prefill)]
    assert [token.id for token in again[len(details.prefill) :]] == [token.id for token in tokens]
    assert [token.logprob for token in again[len(details.prefill) :]] == pytest.approx([token.logprob for token in tokens], abs=1e-3)
    assert "".join(token.text for token in details.tokens) == answer.generated_text
    assert all(token.logprob <= 0 and not token.special for token in details.tokens)


def test_stream_equals_its_twin(client: Any):
    for parameters in ({}, {"do_sample": True, "seed": 7, "temperature": 1.5}, {"stop_sequences": ["."], "top_n_tokens": 3}):
        whole = client.generate(PROMPT, max_new_tokens=16, **parameters)
        events = list(client.generate_stream(PROMPT, max_new_tokens=16, **parameters))
        assert [event.token.id for event in events] == [token.id for token in whole.details.tokens]
        assert events[-1].generated_text == whole.generated_text
        assert events[-1].details.finish_reason == whole.details.finish_reason
        assert events[-1].details.generated_tokens == whole.details.generated_tokens == len(events)
        assert events[-1].details.seed == whole.details.seed == parameters.get("seed")
        assert [event.token.logprob for event in events] == pytest.approx([token.logprob for token in whole.details.tokens], abs=1e-3)
        if "top_n_tokens" in parameters:
            assert all(len(event.top_tokens) == 3 for event in events) and len(whole.details.top_tokens) == len(events)


def test_every_parameter(client: Any):
    answer = client.generate(
        PROMPT,
        do_sample=True,
        max_new_tokens=6,
        repetition_penalty=1.2,
        frequency_penalty=0.1,
        return_full_text=True,
        seed=3,
        stop_sequences=["\n\n", "###"],
        temperature=0.5,
        top_k=10,
        top_p=0.9,
        truncate=100,
        typical_p=0.95,
        top_n_tokens=2,
    )
    assert answer.generated_text.startswith(PROMPT) and answer.details.seed == 3
    best = client.generate(PROMPT, do_sample=True, best_of=2, max_new_tokens=4)
    assert len(best.details.best_of_sequences) == 1


def test_stop_keeps_its_text(client: Any):
    answer = client.generate(PROMPT, max_new_tokens=40, stop_sequences=["."])
    assert answer.generated_text.endswith(".") and answer.details.finish_reason.value == "stop_sequence"


def test_chat(client: Any):
    answer = client.chat([{"role": "user", "content": "What is the capital of France?"}], max_tokens=20, temperature=0.0)
    assert answer.choices[0].message.content == "The capital of France is Paris."
    assert answer.choices[0].finish_reason == "stop" and answer.usage["completion_tokens"] > 5


def test_errors_are_the_clients_own(client: Any, text_generation: ModuleType):
    errors = text_generation.errors
    with pytest.raises(errors.ValidationError, match="must have less than"):
        client.generate("word " * 20_000)
    with pytest.raises(errors.ValidationError, match="`max_new_tokens` must be strictly positive"):
        client.generate(PROMPT, max_new_tokens=0)
    with pytest.raises(errors.ValidationError, match="stop"):
        client.generate(PROMPT, stop_sequences=["x"] * 100)


def test_asynchronous_client(text_generation: ModuleType, server_url: str):
    async def ask() -> tuple[list[str], list[str]]:
        client = text_generation.AsyncClient(server_url, timeout=60)
        answers = await asyncio.gather(*(client.generate(PROMPT, max_new_tokens=8) for _ in range(4)))
        streamed = [event.token.text async for event in client.generate_stream(PROMPT, max_new_tokens=8)]
        return [answer.generated_text for answer in answers], streamed

    answers, streamed = asyncio.run(ask())
    assert len(set(answers)) == 1 and "".join(streamed) == answers[0]


def test_grammars(client: Any, text_generation: ModuleType):
    types = text_generation.types
    regex = types.Grammar(type=types.GrammarType.Regex, value="[0-9]{2}\\.[0-9]{2}")
    answer = client.generate("Pi is about", grammar=regex, max_new_tokens=20)
    assert re.fullmatch(r"[0-9]{2}\.[0-9]{2}", answer.generated_text) and answer.details.finish_reason.value == "eos_token"
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "big": {"type": "boolean"}},
        "required": ["city"],
    }
    for value in (schema, json.dumps(schema)):
        grammar = types.Grammar(type=types.GrammarType.Json, value=value)
        events = list(client.generate_stream("A city as JSON:", grammar=grammar, max_new_tokens=60))
        assert isinstance(json.loads(events[-1].generated_text)["city"], str)
    # TGI's own example: nothing but `properties` is an object with these alone.
    example = types.Grammar(type=types.GrammarType.Json, value={"properties": {"city": schema["properties"]["city"]}})
    for seed in range(3):
        answer = client.generate("A city as JSON:", grammar=example, max_new_tokens=60, do_sample=True, temperature=2.0, seed=seed)
        assert set(json.loads(answer.generated_text)) <= {"city"}
    with pytest.raises(text_generation.errors.ValidationError, match="grammar is not valid: the grammar cannot be compiled: "):
        client.generate("x", grammar=types.Grammar(type=types.GrammarType.Regex, value="[0-9"))
