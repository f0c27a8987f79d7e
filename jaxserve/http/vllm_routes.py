"""Routes that vLLM's users know: /detokenize, /tokenizer_info and /version; its /tokenize is in tokenize_routes.py."""

from typing import Any

from fastapi import APIRouter
from pydantic import Field

from jaxserve.errors import InvalidRequest
from jaxserve.http import VERSION
from jaxserve.http.body import Body, json_route
from jaxserve.http.service import Service


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[int] = Field(description="Token ids.")


class Detokenized(Body):
    """The text of token ids, special tokens included."""

    prompt: str


class Version(Body):
    """Which jaxserve this is."""

    version: str


def vllm_routes(service: Service) -> APIRouter:
    """Routes by vLLM's names."""
    router = APIRouter(route_class=json_route(service.options.payload_limit), tags=["vLLM"])

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> Detokenized:
        """The text of token ids."""
        service.check_model(body.model)
        if body.tokens and not 0 <= min(body.tokens) <= max(body.tokens) < service.info.vocab_size:
            raise InvalidRequest(f"`tokens` must be >= 0 and < {service.info.vocab_size}", "tokens")
        text = await service.in_thread(service.tokenizer.decode, body.tokens, False, size=len(body.tokens))
        return Detokenized(prompt=text)

    @router.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, Any]:
        """What a client must know to prepare prompts itself."""
        tokenizer = service.tokenizer
        ends = {name: None if token_id is None else tokenizer.token_text(token_id) for name, token_id in tokenizer.end_tokens().items()}
        return {**ends, "vocab_size": service.info.vocab_size, "chat_template": tokenizer.chat_template()}

    @router.get("/version")
    async def version() -> Version:
        """Which jaxserve this is."""
        return Version(version=VERSION)

    return router
