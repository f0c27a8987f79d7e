"""What a server tells of itself: health, info, metrics.

The port is open from the start. /health/live answers 200 as soon as it is; /health, /health/ready, /ping and GET / answer 503 until the
model is loaded and whenever no engine can be asked: one of several replicas is enough. /health/ready tells which there are.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from jaxserve.http import VERSION
from jaxserve.http.service import Service
from jaxserve.metrics import CONTENT_TYPE

RETRY_AFTER = 5  # seconds


def metrics_alone(app: ASGIApp, ports: Sequence[int]) -> ASGIApp:
    """Wrap an application so that on some of its ports it answers /metrics and nothing else."""

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["server"][1] in ports and scope["path"] != "/metrics":
            await PlainTextResponse("only /metrics is here", 404)(scope, receive, send)
        else:
            await app(scope, receive, send)

    return call if ports else app


def status_routes(service: Service, environment: Mapping[str, str]) -> APIRouter:
    """Routes that generate nothing.

    Args:
        environment: Vertex AI names its probe's path in AIP_HEALTH_ROUTE.
    """
    router = APIRouter(tags=["status"])

    @router.head("/", include_in_schema=False)
    @router.get("/", include_in_schema=False)
    @router.head("/health", include_in_schema=False)
    @router.get("/ping")
    @router.get("/health")
    async def ready() -> Response:
        """Whether requests can be answered now."""
        if service.ready:
            return Response()
        body = {"error": "unhealthy", "error_type": "healthcheck"}
        return JSONResponse(body, 503, headers={"retry-after": str(RETRY_AFTER)})

    if route := environment.get("AIP_HEALTH_ROUTE"):
        router.get(route, include_in_schema=False)(ready)

    @router.get("/health/ready")
    async def ready_replicas() -> Response:
        """Whether requests can be answered now, and which of the engine's replicas answer."""
        replicas = [{"replica": client.replica, "ready": client.available} for client in service.router.clients]
        if service.ready:
            return JSONResponse({"replicas": replicas})
        body = {"error": "unhealthy", "error_type": "healthcheck", "replicas": replicas}
        return JSONResponse(body, 503, headers={"retry-after": str(RETRY_AFTER)})

    @router.get("/health/live")
    async def live() -> Response:
        """Whether this process answers at all."""
        return Response()

    @router.get("/info")
    async def info() -> dict[str, Any]:
        """Model and limits, as TGI tells them, and the device."""
        told, options = service.info, service.options
        return {
            "model_id": told.model_id,
            "model_sha": told.revision or None,
            "model_pipeline_tag": "text-generation",
            "model_dtype": told.dtype,
            "model_device_type": told.device,
            "mesh": told.mesh,
            "kv_cache_dtype": told.kv_cache_dtype,
            "quantization": told.quantization or None,
            "weight_bytes": told.weight_bytes,
            "deterministic": told.deterministic,
            "max_concurrent_requests": service.max_concurrent_requests,
            "max_best_of": options.max_best_of,
            "max_stop_sequences": options.max_stop_sequences,
            "max_input_tokens": told.max_input_tokens,
            "max_total_tokens": told.max_total_tokens,
            "validation_workers": options.validation_workers,
            "max_client_batch_size": options.max_client_batch_size,
            "router": "jaxserve",
            "version": VERSION,
            "sha": None,
            "docker_label": None,
        }

    @router.get("/metrics")
    def metrics() -> Response:
        """Prometheus metrics of the whole server."""
        return PlainTextResponse(service.metrics.exposition(), media_type=CONTENT_TYPE)

    return router
