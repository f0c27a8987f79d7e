"""schemathesis over our own description of the API: whatever a client sends, no 5xx and no undocumented status."""

from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from live_front_end import LiveFrontEnd
from pytest import Subtests
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import status_code_conformance

CHECKS = [not_a_server_error, status_code_conformance]


def test_no_5xx_and_no_undocumented_status(front_end: LiveFrontEnd, subtests: Subtests):
    """Behind the server is the engine double, which answers at once."""
    ask_everything(front_end.url, subtests, list(GenerationMode), num_examples=8, shortened=False)
    assert front_end.client.post("/v1/completions", json={"prompt": "abc", "temperature": 0}).json()["choices"][0]["text"] == "abc"


@pytest.mark.demo
def test_none_with_the_demo_model(server_url: str, subtests: Subtests):
    ask_everything(server_url, subtests, [GenerationMode.POSITIVE], num_examples=2, shortened=True)
    assert httpx.get(f"{server_url}/health").status_code == 200


def ask_everything(url: str, subtests: Subtests, modes: list[GenerationMode], num_examples: int, shortened: bool) -> None:
    """So many examples of each operation and mode."""
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations: list[Any] = [found.ok() for found in schema.get_all_operations()]  # pyright: ignore[reportAttributeAccessIssue]
    assert len(operations) > 15
    for operation in operations:
        for mode in modes if operation.body else [GenerationMode.POSITIVE]:

            @settings(
                max_examples=num_examples,
                deadline=None,
                phases=[Phase.generate],
                suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
                derandomize=True,
                database=None,
            )
            @given(case=operation.as_strategy(generation_mode=mode))
            def ask(case: schemathesis.Case) -> None:
                if shortened:
                    shorten(case.body)
                case.call_and_validate(checks=CHECKS, timeout=60)

            with subtests.test(operation=operation.label, mode=mode.value):
                ask()


def shorten(body: Any) -> None:
    """Ask for two tokens at most, by the name that this kind of body has for it."""
    if not isinstance(body, dict):
        return
    for instance in body.get("instances") or ():
        shorten(instance)
    if "inputs" in body:
        body["parameters"] = {**(body.get("parameters") or {}), "max_new_tokens": 2}
    elif "input" in body:
        body["max_output_tokens"] = 2
    elif "messages" in body or "prompt" in body:
        body["max_tokens"] = 2
