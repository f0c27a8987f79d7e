"""/v1/responses: OpenAI's newer way to ask. Responses are kept in memory, in the one HTTP process; see response_store.py."""

import time
from collections.abc import Mapping
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from jaxserve.errors import InvalidRequest
from jaxserve.http.answer import aborted_on_disconnect
from jaxserve.http.body import json_route
from jaxserve.http.documented import OPENAI_ERRORS
from jaxserve.http.errors import NotFound
from jaxserve.http.response_inputs import input_items, page
from jaxserve.http.response_items import ResponseItems, new_id
from jaxserve.http.response_rendering import ResponseEvents, response_end, response_head, token_logprobs
from jaxserve.http.response_store import ResponseStore, StoredResponse
from jaxserve.http.responses_types import ResponsesBody, messages_of
from jaxserve.http.service import Service
from jaxserve.http.sse import EventStream
from jaxserve.http.timing import stream_headers, timing_headers


def responses_routes(service: Service) -> APIRouter:
    """The routes under /v1/responses."""
    router = APIRouter(
        prefix="/v1/responses", route_class=json_route(service.options.payload_limit), tags=["OpenAI"], responses=OPENAI_ERRORS
    )
    store = ResponseStore()
    alone = service.options.http_workers in (None, 1)  # without a launcher, which tells a number, there are no others

    def stored(response_id: str, param: str | None = None) -> StoredResponse:
        if not alone:
            raise InvalidRequest("responses are kept only where there is one HTTP process (--http-workers 1); here are several", param)
        response = store.get(response_id)
        if response is None:
            raise NotFound(f"Response with id '{response_id[:256]}' not found.", param)
        return response

    @router.post("", response_model=None)
    async def create(request: Request, body: ResponsesBody) -> Response:
        """Answer an input."""
        arrived = time.perf_counter()
        service.check_model(body.model)
        service.check_stop(body.stop)
        previous = None if body.previous_response_id is None else stored(body.previous_response_id, "previous_response_id")
        messages = body.new_messages()
        earlier = previous.messages if previous else ()
        conversation = body.conversation_after(earlier, messages, service.info.defaults, service.options.max_top_n_tokens)
        response_id = new_id("resp")
        turn = await service.turn(response_id, conversation, arrived, cache_salt=body.cache_salt or "")
        head = response_head(service, body, conversation.params, response_id)

        def keep(response: Mapping[str, Any]) -> None:
            ended = turn.finish_reason(turn.answers.samples[0]) is not None  # else the client has gone
            if ended and body.keeps and alone:
                parts = previous.parts if previous else ()
                before = [*previous.input_items, *previous.parts[-1].output] if previous else ()
                store.add(response, parts, input_items(body.input, before), [*messages, *messages_of(response["output"])])

        headers = {"x-request-id": response_id}
        if body.stream:
            return EventStream(ResponseEvents(service, turn, head, keep), {**headers, **stream_headers(service, len(turn.prompt))})
        items = ResponseItems()
        async with aborted_on_disconnect(request.receive, turn.answers):
            while tokens := await turn.read():
                for token, delta in tokens:
                    items.push(delta, token_logprobs(service, token))
        items.end(turn.finish_reason(turn.answers.samples[0]) != "length")
        response = response_end(head, turn, items.items)
        keep(response)
        return JSONResponse(response, headers={**headers, **timing_headers(service, turn.answers, len(turn.prompt))})

    @router.get("/{response_id}", response_model=None)
    async def get(response_id: str) -> Response:
        """A response that is kept."""
        return JSONResponse(stored(response_id).body)

    @router.get("/{response_id}/input_items", response_model=None)
    async def list_input_items(
        response_id: str, limit: int = 20, order: Literal["asc", "desc"] = "desc", after: str | None = None
    ) -> Response:
        """What a response that is kept was made from, the newest first: its input, and inputs and outputs before it."""
        return JSONResponse(page(stored(response_id).input_items, limit, order == "desc", after))

    @router.delete("/{response_id}", response_model=None)
    async def delete(response_id: str) -> Response:
        """Forget a response."""
        stored(response_id)
        store.remove(response_id)
        return JSONResponse({"id": response_id, "object": "response", "deleted": True})

    @router.post("/{response_id}/cancel", response_model=None)
    async def cancel(response_id: str) -> Response:
        """Refused: there are no responses in the background."""
        stored(response_id)
        raise InvalidRequest("only a response in the background can be cancelled; close the connection instead", "response_id")

    return router
