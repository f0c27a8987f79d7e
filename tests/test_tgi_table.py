"""docs/tgi.md against the code: every route, field and flag of TGI is in a table, and is what the table says."""

import re
from pathlib import Path
from typing import Any

import pytest
from live_front_end import LiveFrontEnd

from jaxserve.cli.serve import _parser, read_options
from jaxserve.cli.tgi import REFUSED, UNNEEDED
from jaxserve.http.openai_types import ChatBody, CompletionBody
from jaxserve.http.tgi_types import CompatGenerateBody, GenerateParameters

TEXT = (Path(__file__).parent.parent / "docs" / "tgi.md").read_text()
# What TGI 3.3.7's launcher, its router and its routes take.


def words(text: str) -> list[str]:
    """The words of a text."""
    return text.split()


TGI_FLAGS = words("""
    model-id revision validation-workers sharded num-shard quantize speculate dtype kv-cache-dtype trust-remote-code max-concurrent-requests
    max-best-of max-stop-sequences max-top-n-tokens max-input-tokens max-input-length max-total-tokens waiting-served-ratio
    max-batch-prefill-tokens max-batch-total-tokens max-waiting-tokens max-batch-size cuda-graphs hostname port prometheus-port
    shard-uds-path master-addr master-port huggingface-hub-cache weights-cache-override disable-custom-kernels cuda-memory-fraction
    rope-scaling rope-factor
    json-output otlp-endpoint otlp-service-name cors-allow-origin api-key watermark-gamma watermark-delta ngrok ngrok-authtoken ngrok-edge
    tokenizer-config-path disable-grammar-support env max-client-batch-size lora-adapters usage-stats payload-limit enable-prefill-logprobs
    graceful-termination-timeout max-image-fetch-size tokenizer-name master-shard-uds-path
""")
TGI_ROUTES = words("""
    POST / POST /generate POST /generate_stream POST /v1/chat/completions POST /v1/completions POST /invocations POST /vertex POST /tokenize
    POST /chat_tokenize GET / GET /health GET /ping GET /info GET /v1/models GET /metrics GET /docs GET /api-doc/openapi.json
""")
TGI_CHAT = words("""
    model messages max_tokens max_completion_tokens temperature top_p frequency_penalty presence_penalty seed stop logprobs top_logprobs
    logit_bias n stream stream_options tools tool_choice response_format
""")
TGI_COMPLETIONS = words("model prompt max_tokens temperature top_p stream seed suffix repetition_penalty frequency_penalty stop")
KINDS = {"same", "better", "later", "refused"}


def table(heading: str) -> dict[str, str]:
    """First column -> second, of the table below a heading."""
    section = TEXT.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("|")][2:]
    found = {row[0].strip("`"): row[1] for row in rows}
    assert len(found) == len(rows) and set(found.values()) <= KINDS
    return found


def test_flags() -> None:
    told = table("Launcher flags")
    assert set(told) == {f"--{name}" for name in TGI_FLAGS}
    taken = {option for action in _parser()._actions for option in action.option_strings}
    refused = {f"--{flag.name}" for flag in REFUSED}
    assert set(told) <= taken
    assert {name for name, kind in told.items() if kind in ("later", "refused")} == refused
    section = TEXT.split("## Launcher flags", 1)[1]
    unneeded = set(re.findall(r"^\| `(--[a-z-]+)` \|[^\n]*taken without effect", section, re.MULTILINE))
    assert unneeded == {f"--{flag.name}" for flag in UNNEEDED}


def test_fields() -> None:
    generate = table("Fields of `/generate`, `/generate_stream`, `/`, `/tokenize`")
    assert set(generate) == set(GenerateParameters.model_fields) | set(CompatGenerateBody.model_fields)
    chat, completions = table("Fields of `/v1/chat/completions`"), table("Fields of `/v1/completions`")
    assert set(chat) == set(TGI_CHAT) <= set(ChatBody.model_fields)
    assert set(completions) == set(TGI_COMPLETIONS) <= set(CompletionBody.model_fields)


def test_fields_that_come_later_are_refused(front_end: LiveFrontEnd) -> None:
    values: dict[str, Any] = {"adapter_id": "x"}
    told = table("Fields of `/generate`, `/generate_stream`, `/`, `/tokenize`")
    assert {name for name, kind in told.items() if kind in ("later", "refused")} == set(values)
    for name, value in values.items():
        answer = front_end.client.post("/generate", json={"inputs": "a", "parameters": {name: value}})
        assert answer.status_code == 422 and name in answer.json()["error"]


def test_routes(front_end: LiveFrontEnd) -> None:
    told = table("Routes")
    wanted = {f"{method} {path}" for method, path in zip(TGI_ROUTES[::2], TGI_ROUTES[1::2], strict=True)}
    assert {route for route, kind in told.items() if kind != "refused"} == wanted
    for route in wanted:
        method, path = route.split()
        assert front_end.client.request(method, path).status_code not in (404, 405), route


def test_environment(capsys: pytest.CaptureFixture[str]) -> None:
    values = {
        "HF_MODEL_ID": "m",
        "HF_MODEL_REVISION": "r",
        "HF_MODEL_QUANTIZE": "awq",
        "SM_NUM_GPUS": "1",
        "HF_MODEL_TRUST_REMOTE_CODE": "1",
        "SAGEMAKER_BIND_TO_PORT": "9",
        "AIP_HTTP_PORT": "8",
        "AIP_PREDICT_ROUTE": "/p",
        "AIP_HEALTH_ROUTE": "/h",
        "HF_TOKEN": "t",
        "HF_HUB_OFFLINE": "1",
        "LOG_LEVEL": "info",
        "COMPUTE_TYPE": "x",
        "PREFIX_CACHING": "1",
        "ATTENTION": "auto",
        "PREFILL_CHUNKING": "1",
        "CUDA_GRAPHS": "1,2",
    }
    told = table("Environment")
    assert set(told) == {*values}
    assert read_options([], dict(values))[0].quantize == "awq"
