"""OpenTelemetry: each request that asks for work is a span, in the trace that its client's `traceparent` header names (W3C).

The attributes are those of TGI's spans (milliseconds) and of OpenTelemetry's conventions for generative models.
"""

from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from jaxserve.http import VERSION
from jaxserve.http.request_record import RequestRecord

EXPORT_TIMEOUT = 2  # seconds a batch may take: a collector that is gone must not hold up the end of the server
# Field of a record -> attribute, factor.
_TIMES = {"total_time": "total_time", "validation_time": "validation_time", "queue_time": "queue_time", "inference_time": "inference_time"}


class Tracing:
    """Sends spans over OTLP (gRPC), in batches, from a thread of its own.

    Args:
        endpoint: of the collector; with http:// or without a scheme the connection is not encrypted.
        service_name: of this server in traces.
    """

    def __init__(self, endpoint: str, service_name: str):
        exporter = OTLPSpanExporter(endpoint=endpoint, insecure=not endpoint.startswith("https://"), timeout=EXPORT_TIMEOUT)
        resource = Resource.create({"service.name": service_name, "service.version": VERSION})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("jaxserve", VERSION)
        self._propagator = TraceContextTextMapPropagator()

    def tell(self, record: RequestRecord) -> None:
        """Send a request as a span, and its waiting and its computing as spans inside."""
        if record.method != "POST":
            return
        told = record.fields()
        parent = self._propagator.extract(dict(record.headers))
        span = self._tracer.start_span(f"POST {record.path}", parent, SpanKind.SERVER, start_time=record.began)
        span.set_attributes(
            {
                "http.request.method": record.method,
                "url.path": record.path,
                "http.response.status_code": record.status,
                "jaxserve.request_id": record.request_id,
                "jaxserve.outcome": record.outcome,
            }
        )
        for name, attribute in _TIMES.items():
            if name in told:
                span.set_attribute(attribute, round(1000 * told[name], 3))
        if record.answers:
            span.set_attributes(
                {
                    "gen_ai.usage.input_tokens": told["prompt_tokens"],
                    "gen_ai.usage.output_tokens": told["output_tokens"],
                    "gen_ai.response.finish_reasons": [reason or "aborted" for reason in told["finish_reasons"]],
                    "gen_ai.server.time_to_first_token": told["first_token_time"],
                    "time_per_token": round(1000 * told["inference_time"] / max(told["output_tokens"], 1), 3),
                }
            )
            seeds = [answer.request.params.seed for answer in record.answers]
            if len(seeds) == 1 and seeds[0] is not None:
                span.set_attribute("seed", str(seeds[0]))
            inside = set_span_in_context(span)
            begin = record.began
            for name in ("validation_time", "queue_time", "inference_time"):
                end = min(begin + int(1e9 * told[name]), record.ended)
                self._tracer.start_span(name.removesuffix("_time"), inside, start_time=begin).end(end)
                begin = end
        if record.outcome == "failed":
            span.set_status(Status(StatusCode.ERROR, told.get("error", "")))
        span.end(record.ended)

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()
