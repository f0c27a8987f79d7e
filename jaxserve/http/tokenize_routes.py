"""TGI's routes that tokenize: /tokenize and /chat_tokenize."""

from collections import deque
from collections.abc import Iterator
from itertools import islice

from fastapi import APIRouter, Response

from jaxserve.errors import InvalidRequest
from jaxserve.http.body import json_route
from jaxserve.http.openai_types import ChatBody
from jaxserve.http.service import Service
from jaxserve.http.sse import compact, quoted
from jaxserve.http.tgi_answers import ChatTokenizeResponse, SimpleToken, whole
from jaxserve.http.tgi_types import GenerateBody, check_truncate
from jaxserve.tokenizer import Tokenizer

_TOKENS_AT_ONCE = 1024


def tokenize_routes(service: Service) -> APIRouter:
    """Routes that tell the tokens of a text, with the bytes that each covers."""
    router = APIRouter(route_class=json_route(service.options.payload_limit), tags=["TGI"])

    @router.post("/tokenize", **whole(list[SimpleToken]))
    async def tokenize(body: GenerateBody) -> Response:
        """The tokens of a text."""
        if not body.inputs:
            raise InvalidRequest("`inputs` cannot be empty", "inputs")
        truncate = body.given.truncate
        check_truncate(truncate, service.info)
        told = await service.in_thread(_spans, service.tokenizer, body.inputs, True, truncate, size=len(body.inputs))
        return Response(told, media_type="application/json")

    @router.post("/chat_tokenize", **whole(ChatTokenizeResponse))
    async def chat_tokenize(body: ChatBody) -> Response:
        """The text that a chat template makes of a conversation, and its tokens."""
        text, _ = await service.render(body.conversation(service.info.defaults, service.options.max_top_n_tokens))
        tokens = await service.in_thread(_spans, service.tokenizer, text, False, None, size=len(text))
        return Response(f'{{"tokenize_response":{tokens},"templated_text":{quoted(text)}}}', media_type="application/json")

    return router


def _spans(tokenizer: Tokenizer, text: str, add_special_tokens: bool, last: int | None) -> str:
    """JSON of the last so many tokens (None: of all); made in pieces, because a megabyte of text is a million tokens."""
    spans = tokenizer.spans(text, add_special_tokens)
    chosen = iter(spans if last is None else deque(spans, last))

    def pieces() -> Iterator[str]:
        while some := list(islice(chosen, _TOKENS_AT_ONCE)):
            yield ",".join(f'{{"id":{span.token_id},"text":{compact(span.text)},"start":{span.start},"stop":{span.stop}}}' for span in some)

    return f"[{','.join(pieces())}]"
