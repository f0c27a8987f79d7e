"""The ASGI application: routes, errors, who may ask."""

import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse, JSONResponse
from fastapi_offline import FastAPIOffline
from starlette.middleware.cors import CORSMiddleware
from starlette.staticfiles import StaticFiles

from jaxserve.http import VERSION
from jaxserve.http.anthropic_routes import anthropic_routes
from jaxserve.http.auth import OPEN_PATHS, TGI_OPEN_ROUTES, ApiKey
from jaxserve.http.documented import TGI_ERRORS
from jaxserve.http.errors import add_error_handlers
from jaxserve.http.openai_routes import openai_routes
from jaxserve.http.platform_routes import platform_routes
from jaxserve.http.request_record import RecordRequests, RequestRecord, log_record
from jaxserve.http.responses_routes import responses_routes
from jaxserve.http.service import Service
from jaxserve.http.status_routes import status_routes
from jaxserve.http.tgi_routes import tgi_routes
from jaxserve.http.tokenize_routes import tokenize_routes
from jaxserve.http.vllm_routes import vllm_routes

STATIC = Path(__file__).parent / "static"
# The chat page runs no code but its own and talks to nobody but this server.
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)


def build_app(
    service: Service,
    lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]] | None = None,
    tell: Sequence[Callable[[RequestRecord], None]] = (),
) -> FastAPI:
    """Put the application together.

    Args:
        service: what the routes work with.
        lifespan: entered before the first request and left after the last.
        tell: who else hears of every request at its end.
    """
    options = service.options
    # Its pages of the API load their scripts from here: browsers ask no other server.
    app = FastAPIOffline(
        "/docs",
        None,
        static_url="/docs/static",
        title="jaxserve",
        version=VERSION,
        description="Serves language models on JAX, with the APIs of OpenAI, of Anthropic and of Text Generation Inference.",
        lifespan=lifespan or _no_lifespan,
    )
    add_error_handlers(app, service.metrics, options.tgi_strict)
    app.include_router(openai_routes(service))
    app.include_router(responses_routes(service))
    app.include_router(anthropic_routes(service))
    app.include_router(tgi_routes(service), responses=TGI_ERRORS)
    app.include_router(tokenize_routes(service), responses=TGI_ERRORS)
    app.include_router(vllm_routes(service), responses=TGI_ERRORS)
    app.include_router(platform_routes(service, os.environ), responses=TGI_ERRORS)
    app.include_router(status_routes(service, os.environ))

    @app.get("/api-doc/openapi.json", include_in_schema=False)
    async def tgi_api_description() -> JSONResponse:
        return JSONResponse(app.openapi())

    @app.get("/chat", include_in_schema=False)
    async def chat_page() -> FileResponse:
        return FileResponse(
            STATIC / "chat.html",
            headers={"content-security-policy": PAGE_POLICY, "x-content-type-options": "nosniff", "referrer-policy": "no-referrer"},
        )

    app.mount("/chat", StaticFiles(directory=STATIC))
    if options.api_key is not None:
        paths = {*OPEN_PATHS, os.environ.get("AIP_HEALTH_ROUTE", "/health")}
        app.add_middleware(ApiKey, key=options.api_key, open_paths=paths, open_routes=TGI_OPEN_ROUTES if options.tgi_strict else ())
    app.add_middleware(
        CORSMiddleware,
        allow_origins=list(options.cors_allow_origin) or ["*"],
        allow_methods=["GET", "POST", "DELETE"],
        allow_headers=["content-type", "authorization", "x-api-key", "anthropic-version", "anthropic-beta"],
    )
    app.add_middleware(RecordRequests, tell=[log_record, *tell])
    return app


@asynccontextmanager
async def _no_lifespan(app: FastAPI) -> AsyncIterator[None]:
    yield
