"""Anthropic's API: /v1/messages and /v1/messages/count_tokens. The key may be sent as `x-api-key`, see auth.py."""

import time

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from jaxserve.http.answer import aborted_on_disconnect
from jaxserve.http.anthropic_rendering import MessageBlocks, MessageEvents, message_end, message_head, new_message_id
from jaxserve.http.anthropic_types import CountBody, MessagesBody
from jaxserve.http.body import json_route
from jaxserve.http.documented import ANTHROPIC_ERRORS
from jaxserve.http.service import Service
from jaxserve.http.sse import EventStream
from jaxserve.http.timing import stream_headers, timing_headers
from jaxserve.request import SamplingParams


def anthropic_routes(service: Service) -> APIRouter:
    """The routes under /v1/messages."""
    router = APIRouter(
        prefix="/v1/messages", route_class=json_route(service.options.payload_limit), tags=["Anthropic"], responses=ANTHROPIC_ERRORS
    )

    @router.post("", response_model=None)
    async def messages(request: Request, body: MessagesBody) -> Response:
        """Go on with a conversation."""
        arrived = time.perf_counter()
        service.check_model(body.model)
        service.check_stop(body.stop_sequences)
        message_id = new_message_id()
        turn = await service.turn(message_id, body.conversation(body.params(service.info.defaults)), arrived)
        head = message_head(service, message_id)
        headers = {"request-id": message_id, "x-request-id": message_id}
        if body.stream:
            return EventStream(MessageEvents(service, turn, head), {**headers, **stream_headers(service, len(turn.prompt))})
        blocks = MessageBlocks()
        async with aborted_on_disconnect(request.receive, turn.answers):
            while tokens := await turn.read():
                for _, delta in tokens:
                    blocks.push(delta)
        return JSONResponse(message_end(head, turn, blocks), headers={**headers, **timing_headers(service, turn.answers, len(turn.prompt))})

    @router.post("/count_tokens", response_model=None)
    async def count_tokens(body: CountBody) -> Response:
        """The number of tokens of a conversation, tools included."""
        service.check_model(body.model)
        _, token_ids = await service.render(body.conversation(SamplingParams()), limited=False)
        return JSONResponse({"input_tokens": len(token_ids)})

    return router
