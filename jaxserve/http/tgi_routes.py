"""TGI's own routes that generate: /generate, /generate_stream and /."""

import time
import uuid
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from jaxserve.errors import ContextTooLong, InvalidRequest, JaxserveError
from jaxserve.http import tgi_answers
from jaxserve.http.answer import Answers, aborted_on_disconnect
from jaxserve.http.body import json_route
from jaxserve.http.service import LONG_TEXT, Service
from jaxserve.http.sse import EventStream
from jaxserve.http.tgi_answers import GenerateResponse
from jaxserve.http.tgi_rendering import FailedEvents, GenerateEvents, best_first, generate_body
from jaxserve.http.tgi_types import CompatGenerateBody, GenerateBody, GenerateTask, check_truncate, checked_prompt, generate_task
from jaxserve.http.timing import stream_headers, timing_headers


def tgi_routes(service: Service) -> APIRouter:
    """The routes that TGI has and OpenAI has not."""
    router = APIRouter(route_class=json_route(service.options.payload_limit), tags=["TGI"])
    strict = service.options.tgi_strict

    @router.post("/generate", **tgi_answers.whole(GenerateResponse))
    async def generate(request: Request, body: GenerateBody) -> Response:
        """Go on with a text."""
        return await whole(request, body, full_text=False)

    @router.post("/generate_stream", **tgi_answers.streamed())
    async def generate_stream(body: GenerateBody) -> Response:
        """Go on with a text, token by token."""
        return await streamed(body, full_text=False)

    @router.post("/", **tgi_answers.whole_or_streamed(list[GenerateResponse]))
    async def compat_generate(request: Request, body: CompatGenerateBody) -> Response:
        """/generate or, with `stream`, /generate_stream; the whole answer is a list of one."""
        if body.stream:
            return await streamed(body, full_text=True)
        return await whole(request, body, full_text=True, as_list=True)

    async def encode(inputs: str, truncate: int | None) -> list[int]:
        check_truncate(truncate, service.info)
        if truncate is not None:
            return await service.encode(inputs, limited=False)
        limit = service.info.max_input_tokens
        # Of what is quickly tokenized the message tells the number itself.
        if len(inputs) > LONG_TEXT and (least := await service.in_thread(service.tokenizer.least_tokens, inputs)) > limit:
            raise ContextTooLong(f"`inputs` must have less than {limit} tokens. Given: at least {least}", "inputs")
        return await service.encode(inputs, limited=False)

    async def submit(body: GenerateBody, stream: bool) -> tuple[str, Answers, GenerateTask]:
        arrived = time.perf_counter()
        parameters = body.given
        task = generate_task(parameters, service.options, stream)
        service.check_stop(parameters.stop)
        if not body.inputs:
            raise InvalidRequest("`inputs` cannot be empty", "inputs")
        token_ids = checked_prompt(await encode(body.inputs, parameters.truncate), parameters, service.info)
        room = service.info.max_total_tokens - len(token_ids)
        prompts = [(token_ids, replace(params, max_tokens=min(params.max_tokens or room, room))) for params in task.params]
        request_id = f"generate-{uuid.uuid4().hex}"
        return request_id, service.answers(request_id, prompts, arrived, keep_pieces=True), task

    def prefix(body: GenerateBody, full_text: bool) -> str:
        wanted = body.given.return_full_text
        return body.inputs if (full_text if wanted is None else wanted) else ""

    async def whole(request: Request, body: GenerateBody, full_text: bool, as_list: bool = False) -> Response:
        request_id, answers, task = await submit(body, stream=False)
        async with aborted_on_disconnect(request.receive, answers):
            results = await answers.collect()
        told: Any = generate_body(service, answers, results, body.given, task, prefix(body, full_text))
        best = answers.answers[best_first(results)[0]]  # the other candidates are told of in the details alone
        headers = {"x-request-id": request_id, **timing_headers(service, answers, len(body.inputs), [best])}
        return JSONResponse([told] if as_list else told, headers=headers)

    async def streamed(body: GenerateBody, full_text: bool) -> Response:
        headers = stream_headers(service, len(body.inputs))
        try:
            request_id, answers, task = await submit(body, stream=True)
        except JaxserveError as error:
            if not strict:
                raise
            return EventStream(FailedEvents(service, error), headers, errors_are_events=True)
        events = GenerateEvents(service, answers, body.given, task, prefix(body, full_text))
        return EventStream(events, {"x-request-id": request_id, **headers}, errors_are_events=strict)

    return router
