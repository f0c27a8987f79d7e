"""The API key: every route asks for it but the few that are listed here.

Open are the probes and the chat page itself, which holds no data and sends the key that its user types in. Metrics and the description of
the API tell how much is served and what there is to attack: a scraper sends the key as its bearer token, at --prometheus-port too.
TGI leaves these open, and /info, /v1/models and /chat_tokenize; --tgi-strict does so too.
"""

import hmac
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from jaxserve.http.errors import is_anthropic

OPEN_PATHS = frozenset({"/", "/ping", "/health", "/health/live", "/health/ready", "/chat", "/chat/chat.css", "/chat/chat.js"})
TGI_OPEN_ROUTES = frozenset(
    {("POST", "/chat_tokenize")}
    | {
        (method, path)
        for method in ("GET", "HEAD")
        for path in (
            "/info",
            "/v1/models",
            "/metrics",
            "/docs",
            "/docs/static/swagger-ui-bundle.js",
            "/docs/static/swagger-ui.css",
            "/docs/static/favicon.png",
            "/openapi.json",
            "/api-doc/openapi.json",
        )
    }
)
_WRONG_KEY = {"message": "Incorrect API key provided.", "type": "invalid_request_error", "param": None, "code": "invalid_api_key"}
_WRONG_ANTHROPIC_KEY = {"type": "error", "error": {"type": "authentication_error", "message": _WRONG_KEY["message"]}}


class ApiKey:
    """Middleware that answers 401 to requests without the key.

    Args:
        app: what it guards.
        key: as in `Authorization: Bearer KEY`; Anthropic's clients may send it as `x-api-key`.
        open_paths: may be read without it.
        open_routes: further (method, path) pairs without it.
    """

    def __init__(self, app: ASGIApp, key: str, open_paths: Iterable[str] = OPEN_PATHS, open_routes: Iterable[tuple[str, str]] = ()):
        self._app = app
        self._key = key.encode()
        self._open_routes = frozenset(open_routes) | {(method, path) for method in ("GET", "HEAD") for path in open_paths}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._allows(scope):
            await self._app(scope, receive, send)
            return
        headers = {"www-authenticate": "Bearer"}
        path = scope["path"]
        if is_anthropic(path):
            response: Response = JSONResponse(_WRONG_ANTHROPIC_KEY, 401, headers)
        else:
            response = JSONResponse({"error": _WRONG_KEY}, 401, headers) if path.startswith("/v1/") else Response(None, 401, headers)
        await response(scope, receive, send)

    def _allows(self, scope: Scope) -> bool:
        if (scope["method"], scope["path"]) in self._open_routes:
            return True
        headers = Headers(scope=scope)
        if is_anthropic(scope["path"]) and (sent := headers.get("x-api-key")) is not None:
            return hmac.compare_digest(sent.strip().encode(), self._key)
        scheme, _, key = headers.get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(key.strip().encode(), self._key)
