"""Routes that tokenize: /tokenize, TGI's and vLLM's, and TGI's /chat_tokenize."""

from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import Annotated, Any

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse
from pydantic import Discriminator, Tag

from jaxserve.errors import InvalidRequest
from jaxserve.http.body import Body, json_route
from jaxserve.http.openai_types import ChatBody
from jaxserve.http.service import Service
from jaxserve.http.sse import compact, quoted
from jaxserve.http.tgi_answers import ChatTokenizeResponse, SimpleToken, whole
from jaxserve.http.tgi_types import GenerateBody, check_truncate
from jaxserve.tokenizer import Tokenizer

_TOKENS_AT_ONCE = 1024


class VllmPromptBody(Body):
    """POST /tokenize as vLLM has it, of a text."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class VllmMessagesBody(ChatBody):
    """POST /tokenize as vLLM has it, of a conversation."""

    return_token_strs: bool | None = None


def _kind(body: Any) -> str:
    names = body if isinstance(body, dict) else ()
    return "TGI" if "inputs" in names or not ("prompt" in names or "messages" in names) else "PROMPT" if "prompt" in names else "MESSAGES"


TokenizeBody = Annotated[
    Annotated[GenerateBody, Tag("TGI")] | Annotated[VllmPromptBody, Tag("PROMPT")] | Annotated[VllmMessagesBody, Tag("MESSAGES")],
    Discriminator(_kind),
]


def tokenize_routes(service: Service) -> APIRouter:
    """Routes that tell the tokens of a text, with the bytes that each covers."""
    router = APIRouter(route_class=json_route(service.options.payload_limit), tags=["TGI"])

    @router.post("/tokenize", **whole(list[SimpleToken]))
    async def tokenize(body: TokenizeBody) -> Response:
        """The tokens of a text: with `inputs` as TGI tells them, with `prompt` or `messages` as vLLM does."""
        if not isinstance(body, GenerateBody):
            return await vllm_tokenize(body)
        if not body.inputs:
            raise InvalidRequest("`inputs` cannot be empty", "inputs")
        truncate = body.given.truncate
        check_truncate(truncate, service.info)
        told = await service.in_thread(_spans, service.tokenizer, body.inputs, True, truncate, size=len(body.inputs))
        return Response(told, media_type="application/json")

    async def vllm_tokenize(body: VllmPromptBody | VllmMessagesBody) -> Response:
        service.check_model(body.model)
        if isinstance(body, VllmPromptBody):
            token_ids = await service.encode(body.prompt, body.add_special_tokens is not False, limited=False)
        else:
            conversation = body.conversation(service.info.defaults, service.options.max_top_n_tokens)
            text, token_ids = await service.render(conversation, limited=False)
            if body.add_special_tokens:
                token_ids = await service.encode(text, limited=False)
        texts = [service.tokenizer.token_text(token_id) for token_id in token_ids] if body.return_token_strs else None
        told = {"count": len(token_ids), "max_model_len": service.info.max_total_tokens, "tokens": token_ids, "token_strs": texts}
        return JSONResponse(told)

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
