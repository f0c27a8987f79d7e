"""One line a request in the log, whatever came of it, and one span where a collector is given; never the text."""

import json
import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import httpx
import pytest
from live_front_end import LiveFrontEnd
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from tiny_models import write_tokenizer

from jaxserve.launcher.logs import _JsonFormatter

SECRET = "hello"
LOGGER = "jaxserve.http.request_record"


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps the spans that it is sent."""

    def __init__(self) -> None:
        self.resources: list[Any] = []
        self._server = grpc.server(ThreadPoolExecutor(1))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()

    def Export(self, request: Any, context: Any) -> Any:
        self.resources += request.resource_spans
        return trace_service_pb2.ExportTraceServiceResponse()

    def spans(self) -> list[Any]:
        return [span for resource in self.resources for scope in resource.scope_spans for span in scope.spans]

    def stop(self) -> None:
        self._server.stop(0)


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.stop()


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[LiveFrontEnd]:
    """A front end that sends traces, and asks for a key."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    server = {"api_key": "k", "otlp_endpoint": f"http://127.0.0.1:{collector.port}", "otlp_service_name": "tested"}
    live = LiveFrontEnd(folder, server, {"fail_token_id": 299})
    live.client.headers["authorization"] = "Bearer k"
    live.start()
    yield live
    live.stop()


def _told(caplog: pytest.LogCaptureFixture, count: int) -> list[dict[str, Any]]:
    """The fields of the lines, once there are so many, and that no line holds the text."""
    deadline = time.monotonic() + 10
    while len(records := [record for record in caplog.records if record.name == LOGGER]) < count:
        assert time.monotonic() < deadline, records
        time.sleep(0.01)
    assert not any(SECRET in record.getMessage() or "\n" in record.getMessage() for record in caplog.records)
    return [json.loads(_JsonFormatter().format(record)) for record in records]


@pytest.fixture(autouse=True)
def _heard(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, LOGGER)


def test_a_request_that_went_well(traced: LiveFrontEnd, caplog: pytest.LogCaptureFixture):
    body = {"inputs": SECRET, "parameters": {"max_new_tokens": 2}}
    answer = traced.client.post("/generate", json=body, headers={"x-request-id": "mine-1"})
    traced.client.get("/health")
    (told,) = _told(caplog, 1)
    assert told["request_id"] == answer.headers["x-request-id"] and told["client_request_id"] == "mine-1"
    wanted = {"method": "POST", "path": "/generate", "status": 200, "outcome": "done", "prompt_tokens": 3, "output_tokens": 2}
    assert told.items() >= {**wanted, "finish_reasons": ["length"], "cached_tokens": 1, "level": "INFO"}.items()
    assert 0 < told["first_token_time"] <= told["total_time"]


def test_requests_that_are_refused(traced: LiveFrontEnd, caplog: pytest.LogCaptureFixture):
    assert traced.client.post("/generate", json={"inputs": SECRET, "parameters": {"top_p": 7}}).status_code == 422
    assert traced.client.post("/generate", json={"inputs": SECRET}, headers={"authorization": "no"}).status_code == 401
    assert traced.client.post("/nothing%0Ahere", json={}).status_code == 404
    traced.engine.max_concurrent_requests = 0
    try:
        assert traced.client.post("/generate", json={"inputs": SECRET}).status_code == 429
    finally:
        traced.engine.max_concurrent_requests = 1024
    told = _told(caplog, 4)
    assert [each["status"] for each in told] == [422, 401, 404, 429]
    assert {each["outcome"] for each in told} == {"refused"}
    assert told[0]["error"] == "`top_p` must be > 0.0 and <= 1.0" and told[2]["path"] == "/nothing\\nhere"
    assert all(each["request_id"] for each in told)


def test_what_a_client_sent_stays_in_its_line(traced: LiveFrontEnd, caplog: pytest.LogCaptureFixture):
    assert traced.client.get("/v1/responses/a%0A2026-01-01%20INFO%1B[31m").status_code == 404
    assert traced.client.post("/v1/responses", json={"input": "x", "model": "é\n\u202e\x00" + "x" * 100000}).status_code == 404
    responses, model = _told(caplog, 2)
    assert responses["error"] == "Response with id 'a\\n2026-01-01 INFO\\x1b[31m' not found."
    assert "`é\\n\\u202e\\x00xx" in model["error"] and len(model["error"]) < 1100


def test_requests_that_fail_or_are_given_up(traced: LiveFrontEnd, caplog: pytest.LogCaptureFixture):
    assert traced.client.post("/v1/completions", json={"prompt": [70, 71, 299], "temperature": 0}).status_code == 500
    with traced.client.stream("POST", "/v1/completions", json={"prompt": [70, 71, 299], "temperature": 0, "stream": True}) as stream:
        assert stream.status_code == 200 and "generation_failed" in stream.read().decode()
    traced.engine.forever, traced.engine.step_seconds = True, 0.01
    try:
        body = {"prompt": SECRET, "max_tokens": 2000, "stream": True}
        with httpx.stream("POST", traced.url + "/v1/completions", json=body, headers={"authorization": "Bearer k"}) as stream:
            next(stream.iter_lines())
        told = _told(caplog, 3)
    finally:
        traced.engine.forever, traced.engine.step_seconds = False, 0.0
    assert [each["outcome"] for each in told] == ["failed", "failed", "aborted"]
    assert [each["status"] for each in told] == [500, 200, 200]
    assert told[0]["error"] == told[1]["error"] == "the step failed" and told[2]["finish_reasons"] == [None]


def test_spans_belong_to_the_clients_trace(traced: LiveFrontEnd, collector: Collector):
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    body = {"inputs": SECRET, "parameters": {"max_new_tokens": 2, "seed": 7, "do_sample": True}}
    answer = traced.client.post("/generate", json=body, headers={"traceparent": f"00-{trace}-{parent}-01"})
    assert answer.status_code == 200
    traced.http._tracing._provider.force_flush()  # type: ignore[union-attr]
    spans = [span for span in collector.spans() if span.trace_id.hex() == trace]
    (root,) = (span for span in spans if span.name == "POST /generate")
    assert root.parent_span_id.hex() == parent
    assert {span.name for span in spans if span.parent_span_id == root.span_id} == {"validation", "queue", "inference"}
    values = {each.key: each.value for each in root.attributes}
    assert values["gen_ai.usage.input_tokens"].int_value == 3 and values["gen_ai.usage.output_tokens"].int_value == 2
    assert values["seed"].string_value == "7" and values["http.response.status_code"].int_value == 200
    assert SECRET not in str(spans)
    names = {each.key: each.value.string_value for resource in collector.resources for each in resource.resource.attributes}
    assert names["service.name"] == "tested"


def test_records_of_requests_at_once_are_apart(traced: LiveFrontEnd, caplog: pytest.LogCaptureFixture):
    def post(count: int) -> None:
        traced.client.post("/generate", json={"inputs": "a" * count, "parameters": {"max_new_tokens": 1}})

    threads = [threading.Thread(target=post, args=(count,)) for count in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    told = _told(caplog, 8)
    assert all(each["output_tokens"] == 1 for each in told) and len({each["request_id"] for each in told}) == 8
