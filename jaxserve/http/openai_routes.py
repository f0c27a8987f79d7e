"""/v1/*: models, chat completions, completions."""

import time
import uuid
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from jaxserve.errors import InvalidRequest
from jaxserve.http.answer import aborted_on_disconnect
from jaxserve.http.body import json_route
from jaxserve.http.openai_events import ChatEvents, CompletionEvents
from jaxserve.http.openai_rendering import chat_body, completion_body, head
from jaxserve.http.openai_types import ChatBody, CompletionBody, Prompt
from jaxserve.http.service import Service
from jaxserve.http.sse import EventStream
from jaxserve.http.timing import timing_headers


def openai_routes(service: Service) -> APIRouter:
    """The routes under /v1."""
    router = APIRouter(prefix="/v1", route_class=json_route(service.options.payload_limit), tags=["OpenAI"])

    @router.get("/models")
    def models() -> dict[str, Any]:
        """The model that is served."""
        return {"object": "list", "data": [_model(service)]}

    @router.get("/models/{name:path}")
    def model(name: str) -> dict[str, Any]:
        """The model that is served, by its name."""
        service.check_model(name)
        return _model(service)

    @router.post("/chat/completions", response_model=None)
    async def chat_completions(request: Request, body: ChatBody) -> Response:
        """Go on with a conversation."""
        arrived = time.perf_counter()
        service.check_model(body.model)
        service.check_stop(body.stop)
        body.check_stream_options()
        params = body.params(service.info.defaults, service.options.max_top_n_tokens)
        params.validate(service.info.vocab_size)
        messages = [message.as_template_value() for message in body.messages]
        prompt, token_ids = await service.render_chat(messages, **body.template_variables())
        request_id = f"chatcmpl-{uuid.uuid4().hex}"
        headers = {"x-request-id": request_id}
        answers = service.answers(request_id, [(token_ids, params)], arrived, cache_salt=body.cache_salt or "")
        if body.stream:
            return EventStream(ChatEvents(service, answers, head(service, request_id), body.include_usage), headers)
        async with aborted_on_disconnect(request.receive, answers):
            results = await answers.collect()
        told = chat_body(head(service, request_id), answers, results, service.tokenizer)
        return JSONResponse(told, headers={**headers, **timing_headers(service, answers, len(prompt))})

    @router.post("/completions", response_model=None)
    async def completions(request: Request, body: CompletionBody) -> Response:
        """Go on with one text or several."""
        arrived = time.perf_counter()
        service.check_model(body.model)
        service.check_stop(body.stop)
        body.check_stream_options()
        params = body.params(service.info.defaults, service.options.max_top_n_tokens)
        params.validate(service.info.vocab_size)
        if len(body.prompt) > (most := service.options.max_client_batch_size):
            raise InvalidRequest(f"`prompt` supports up to {most} prompts. Given: {len(body.prompt)}", "prompt")
        special = body.add_special_tokens is not False
        prompts = [await service.encode(prompt, special) if isinstance(prompt, str) else prompt for prompt in body.prompt]
        echoes = [text for prompt in body.prompt for text in [_echo(service, prompt) if body.echo else ""] * params.n]
        request_id = f"cmpl-{uuid.uuid4().hex}"
        headers = {"x-request-id": request_id}
        answers = service.answers(request_id, [(token_ids, params) for token_ids in prompts], arrived, cache_salt=body.cache_salt or "")
        if body.stream:
            return EventStream(CompletionEvents(service, answers, head(service, request_id), body.include_usage, echoes), headers)
        async with aborted_on_disconnect(request.receive, answers):
            results = await answers.collect()
        told = completion_body(head(service, request_id), answers, results, echoes, service.tokenizer)
        characters = sum(len(prompt) for prompt in body.prompt)
        return JSONResponse(told, headers={**headers, **timing_headers(service, answers, characters)})

    return router


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.model_name,
        "object": "model",
        "created": service.started_at,
        "owned_by": "jaxserve",
        "root": service.info.model_id,
        "max_model_len": service.info.max_total_tokens,
    }


def _echo(service: Service, prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else service.tokenizer.decode(prompt)
