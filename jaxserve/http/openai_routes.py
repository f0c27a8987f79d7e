"""/v1/*: models, chat completions, completions, embeddings (none)."""

import time
import uuid
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from jaxserve.errors import InvalidRequest
from jaxserve.http.answer import aborted_on_disconnect
from jaxserve.http.body import Body, json_route
from jaxserve.http.documented import OPENAI_ERRORS
from jaxserve.http.openai_events import ChatEvents, CompletionEvents
from jaxserve.http.openai_rendering import best, chat_body, completion_body, head
from jaxserve.http.openai_types import ChatBody, CompletionBody, Prompt
from jaxserve.http.service import Service
from jaxserve.http.sse import EventStream
from jaxserve.http.timing import stream_headers, timing_headers
from jaxserve.http.turn_events import TurnEvents

MAX_COMPLETIONS = 1024  # samples that one request may ask for, of all its prompts


class EmbeddingBody(Body):
    """POST /v1/embeddings."""

    model: str | None = None
    input: Any = None


def openai_routes(service: Service) -> APIRouter:
    """The routes under /v1."""
    strict = service.options.tgi_strict
    router = APIRouter(prefix="/v1", route_class=json_route(service.options.payload_limit), tags=["OpenAI"], responses=OPENAI_ERRORS)

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

        def truncate(token_ids: list[int]) -> list[int]:
            return body.truncated(token_ids, service.info.max_input_tokens)

        conversation = body.conversation(service.info.defaults, service.options.max_top_n_tokens)
        request_id = f"chatcmpl-{uuid.uuid4().hex}"
        turn = await service.turn(
            request_id,
            conversation,
            arrived,
            cache_salt=body.cache_salt or "",
            add_special_tokens=bool(body.add_special_tokens),
            truncate=None if body.truncate_prompt_tokens is None else truncate,
        )
        headers = {"x-request-id": request_id}
        beginning = head(service, request_id)
        if strict and body.model not in (None, "", "tgi"):
            beginning["model"] = body.model
        goes_on = body.echo and conversation.variables["continue_final_message"]
        streamed = {**headers, **stream_headers(service, len(turn.prompt))}
        echoes = [(body.messages[-1].content or "") if goes_on else ""] * len(turn.answers.samples)
        if body.stream and turn.plain:
            return EventStream(ChatEvents(service, turn.answers, beginning, body, echoes), streamed)
        if body.stream:
            return EventStream(TurnEvents(service, turn, beginning, body, echoes), streamed)
        async with aborted_on_disconnect(request.receive, turn.answers):
            messages = await turn.collect()
        for message in messages:
            message.content = echoes[message.sample.choice] + message.content
        told = chat_body(beginning, turn, messages, body, service.tokenizer)
        return JSONResponse(told, headers={**headers, **timing_headers(service, turn.answers, len(turn.prompt))})

    @router.post("/completions", response_model=None)
    async def completions(request: Request, body: CompletionBody) -> Response:
        """Go on with one text or several."""
        arrived = time.perf_counter()
        service.check_model(body.model)
        service.check_stop(body.stop)
        body.check_stream_options()
        params = body.params(service.info.defaults, service.options.max_top_n_tokens)
        if strict and body.max_tokens is None:
            params = replace(params, max_tokens=None)  # to the end of the context
        params.validate(service.info.vocab_size)
        if len(body.prompt) > (most := service.options.max_client_batch_size):
            raise InvalidRequest(f"`prompt` supports up to {most} prompts. Given: {len(body.prompt)}", "prompt")
        most_samples = max(MAX_COMPLETIONS, service.options.max_client_batch_size)
        if (count := len(body.prompt) * params.n) > most_samples:
            raise InvalidRequest(f"prompts times samples of each must be <= {most_samples}. Given: {count}", "n" if body.n else "best_of")
        special = body.add_special_tokens is not False
        whole = body.truncate_prompt_tokens is None
        encoded = [await service.encode(prompt, special, limited=whole) if isinstance(prompt, str) else prompt for prompt in body.prompt]
        prompts = [body.truncated(token_ids, service.info.max_input_tokens) for token_ids in encoded]
        shown = body.prompt if whole else prompts
        echoes = [text for prompt in shown for text in [_echo(service, prompt) if body.echo else ""] * params.n]
        request_id = f"cmpl-{uuid.uuid4().hex}"
        headers = {"x-request-id": request_id}
        answers = service.answers(request_id, [(token_ids, params) for token_ids in prompts], arrived, cache_salt=body.cache_salt or "")
        characters = sum(len(prompt) for prompt in body.prompt)
        if body.stream:
            events = CompletionEvents(service, answers, head(service, request_id), body, echoes)
            return EventStream(events, {**headers, **stream_headers(service, characters)})
        async with aborted_on_disconnect(request.receive, answers):
            results = await answers.collect()
        if body.picks:
            results = best(results, params.n, body.n or 1)
        told = completion_body(head(service, request_id), answers, results, echoes, body, service.tokenizer)
        return JSONResponse(told, headers={**headers, **timing_headers(service, answers, characters)})

    @router.post("/embeddings", response_model=None)
    async def embeddings(body: EmbeddingBody) -> Response:
        """Refused: the model generates text."""
        service.check_model(body.model)
        raise InvalidRequest(f"the model `{service.model_name}` generates text; it has no embeddings", "model")

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
