"""TGI's own routes: /generate, /generate_stream, / and /tokenize."""

import time
import uuid
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from jaxserve.errors import InvalidRequest
from jaxserve.http.answer import Answers, aborted_on_disconnect
from jaxserve.http.body import json_route
from jaxserve.http.service import Service
from jaxserve.http.sse import EventStream
from jaxserve.http.tgi_rendering import GenerateEvents, generate_body
from jaxserve.http.tgi_types import CompatGenerateBody, GenerateBody, GenerateTask, checked_prompt, generate_task
from jaxserve.http.timing import stream_headers, timing_headers


def tgi_routes(service: Service) -> APIRouter:
    """The routes that TGI has and OpenAI has not."""
    router = APIRouter(route_class=json_route(service.options.payload_limit), tags=["TGI"])

    @router.post("/generate", response_model=None)
    async def generate(request: Request, body: GenerateBody) -> Response:
        """Go on with a text."""
        return await whole(request, body, full_text=False)

    @router.post("/generate_stream", response_model=None)
    async def generate_stream(body: GenerateBody) -> Response:
        """Go on with a text, token by token."""
        return await streamed(body, full_text=False)

    @router.post("/", response_model=None)
    async def compat_generate(request: Request, body: CompatGenerateBody) -> Response:
        """/generate or, with `stream`, /generate_stream; the whole answer is a list of one."""
        if body.stream:
            return await streamed(body, full_text=True)
        return await whole(request, body, full_text=True, as_list=True)

    @router.post("/tokenize", response_model=None)
    async def tokenize(body: GenerateBody) -> Response:
        """The tokens of a text, with the bytes that each covers."""
        check_inputs(body)
        spans = await service.in_thread(service.tokenizer.spans, body.inputs)
        return JSONResponse([{"id": span.token_id, "text": span.text, "start": span.start, "stop": span.stop} for span in spans])

    def check_inputs(body: GenerateBody) -> None:
        if not body.inputs:
            raise InvalidRequest("`inputs` cannot be empty", "inputs")

    async def submit(body: GenerateBody, stream: bool) -> tuple[str, Answers, GenerateTask]:
        arrived = time.perf_counter()
        task = generate_task(body.parameters, service.options, stream)
        service.check_stop(body.parameters.stop)
        check_inputs(body)
        token_ids = checked_prompt(await service.encode(body.inputs), body.parameters, service.info)
        room = service.info.max_total_tokens - len(token_ids)
        prompts = [(token_ids, replace(params, max_tokens=min(params.max_tokens or room, room))) for params in task.params]
        request_id = f"generate-{uuid.uuid4().hex}"
        return request_id, service.answers(request_id, prompts, arrived, keep_pieces=True), task

    def prefix(body: GenerateBody, full_text: bool) -> str:
        wanted = body.parameters.return_full_text
        return body.inputs if (full_text if wanted is None else wanted) else ""

    async def whole(request: Request, body: GenerateBody, full_text: bool, as_list: bool = False) -> Response:
        request_id, answers, task = await submit(body, stream=False)
        async with aborted_on_disconnect(request.receive, answers):
            results = await answers.collect()
        told: Any = generate_body(service, answers, results, body.parameters, task, prefix(body, full_text))
        headers = {"x-request-id": request_id, **timing_headers(service, answers, len(body.inputs))}
        return JSONResponse([told] if as_list else told, headers=headers)

    async def streamed(body: GenerateBody, full_text: bool) -> Response:
        request_id, answers, task = await submit(body, stream=True)
        events = GenerateEvents(service, answers, body.parameters, task, prefix(body, full_text))
        return EventStream(events, {"x-request-id": request_id, **stream_headers(service, len(body.inputs))})

    return router
