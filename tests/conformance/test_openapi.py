"""schemathesis over our own description of the API: whatever a client sends, no 5xx and no undocumented status."""

from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from live_front_end import LiveFrontEnd
from pytest import Subtests
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import status_code_conformance

EXAMPLES = 8  # of each operation
CHECKS = [not_a_server_error, status_code_conformance]


def test_no_5xx_and_no_undocumented_status(front_end: LiveFrontEnd, subtests: Subtests):
    """Behind the server is the engine double, which answers at once."""
    schema = schemathesis.openapi.from_url(f"{front_end.url}/openapi.json")
    operations: list[Any] = [found.ok() for found in schema.get_all_operations()]  # pyright: ignore[reportAttributeAccessIssue]
    assert len(operations) > 15
    for operation in operations:
        for mode in schemathesis.GenerationMode if operation.body else [schemathesis.GenerationMode.POSITIVE]:

            @settings(
                max_examples=EXAMPLES,
                deadline=None,
                phases=[Phase.generate],
                suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
                derandomize=True,
                database=None,
            )
            @given(case=operation.as_strategy(generation_mode=mode))
            def ask(case: schemathesis.Case) -> None:
                case.call_and_validate(checks=CHECKS, timeout=20)

            with subtests.test(operation=operation.label, mode=mode.value):
                ask()
    assert front_end.client.post("/v1/completions", json={"prompt": "abc", "temperature": 0}).json()["choices"][0]["text"] == "abc"
