"""huggingface_hub's InferenceClient, as it speaks with TGI, against the real server."""

from typing import Any

import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import GenerationError, HfHubHTTPError, ValidationError

pytestmark = [pytest.mark.demo, pytest.mark.usefixtures("hub_online")]
PROMPT = "The capital of France is"


@pytest.fixture
def client(server_url: str) -> InferenceClient:
    return InferenceClient(server_url, timeout=60)


def test_text(client: InferenceClient):
    answer = client.text_generation(PROMPT, max_new_tokens=5, do_sample=False, return_full_text=False)
    assert answer.startswith(" Paris")
    assert client.text_generation(PROMPT, max_new_tokens=5, do_sample=False) == PROMPT + answer  # as TGI's POST / has it
    assert "".join(client.text_generation(PROMPT, max_new_tokens=5, do_sample=False, stream=True)) == answer


def test_details(client: InferenceClient):
    answer = client.text_generation(
        PROMPT, details=True, max_new_tokens=5, top_n_tokens=2, decoder_input_details=True, return_full_text=False, do_sample=False
    )
    details = answer.details
    assert details is not None and (details.finish_reason, details.generated_tokens, details.seed) == ("length", 5, None)
    assert "".join(token.text for token in details.tokens) == answer.generated_text
    assert "".join(token.text for token in details.prefill) == PROMPT
    assert details.top_tokens is not None and [len(top) for top in details.top_tokens] == [2] * 5
    # The client leaves what is nested twice as it came. Greedy: the most likely token is the one that was taken.
    firsts: list[Any] = [top[0] for top in details.top_tokens]
    assert [first["id"] for first in firsts] == [token.id for token in details.tokens]


def test_streamed_details(client: InferenceClient):
    events = list(client.text_generation(PROMPT, details=True, stream=True, max_new_tokens=5, seed=11, do_sample=True))
    assert [event.index for event in events] == [1, 2, 3, 4, 5]
    assert all(event.details is None and event.generated_text is None for event in events[:-1])
    last = events[-1]
    assert last.details is not None and (last.details.finish_reason, last.details.generated_tokens, last.details.seed) == ("length", 5, 11)
    assert last.details.input_length == 5


def test_sampling_is_repeatable(client: InferenceClient):
    parameters = {"do_sample": True, "seed": 5, "temperature": 1.3, "top_k": 40, "top_p": 0.9, "typical_p": 0.9, "max_new_tokens": 12}

    def ask() -> str:
        return client.text_generation(PROMPT, **parameters)

    assert ask() == ask()


def test_errors(client: InferenceClient):
    with pytest.raises((ValidationError, HfHubHTTPError)) as error:
        client.text_generation(PROMPT, max_new_tokens=0)
    assert "max_new_tokens" in str(error.value)
    with pytest.raises((ValidationError, GenerationError, HfHubHTTPError)):
        list(client.text_generation(PROMPT, best_of=3, stream=True, details=True))


def test_endpoint_is_healthy(server_url: str):
    client = InferenceClient(server_url, provider="hf-inference")
    assert client.health_check()
    info = client.get_endpoint_info()
    assert info["model_id"] == "HuggingFaceTB/SmolLM2-135M-Instruct" and info["max_total_tokens"] > 1000
