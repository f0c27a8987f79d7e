"""Routes that cloud platforms ask for: SageMaker's /invocations, Vertex AI's /vertex and $AIP_PREDICT_ROUTE.

Each hands its bodies to the routes that they are meant for, so that fields, limits and errors are theirs.
"""

import asyncio
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from fastapi import Body as BodyField
from fastapi.responses import JSONResponse

from jaxserve.errors import InvalidRequest
from jaxserve.http.body import Body, json_route
from jaxserve.http.forward import Answered, Forwarded, ask
from jaxserve.http.service import Service
from jaxserve.http.tgi_answers import VertexResponse, whole

# The field that tells the routes apart, in the order in which TGI tries them.
_ROUTE_OF_FIELD = {"inputs": "/", "messages": "/v1/chat/completions", "prompt": "/v1/completions"}
MAX_INSTANCES = 32


class VertexBody(Body):
    """Vertex AI's prediction request: each instance is a body of /generate or of /v1/chat/completions."""

    instances: list[dict[str, Any]]


def platform_routes(service: Service, environment: Mapping[str, str]) -> APIRouter:
    """The routes of SageMaker and Vertex AI.

    Args:
        environment: Vertex AI names its route in AIP_PREDICT_ROUTE.
    """
    router = APIRouter(route_class=json_route(service.options.payload_limit), tags=["platforms"])

    @router.post("/invocations", response_model=None)
    async def invocations(request: Request, body: Annotated[dict[str, Any], BodyField()]) -> Response:
        """SageMaker: / for a body with `inputs`, /v1/chat/completions for `messages`, /v1/completions for `prompt`."""
        path = next((path for name, path in _ROUTE_OF_FIELD.items() if name in body), None)
        if path is None:
            raise InvalidRequest("the body must have `inputs`, `messages` or `prompt`")
        return Forwarded(request, path, await request.body())

    async def vertex(request: Request, body: VertexBody) -> Response:
        """Vertex AI: the texts of all answers, as `predictions`."""
        if not body.instances:
            raise InvalidRequest("`instances` cannot be empty", "instances")
        if len(body.instances) > MAX_INSTANCES:
            raise InvalidRequest(f"`instances` supports up to {MAX_INSTANCES} instances. Given: {len(body.instances)}", "instances")
        async with asyncio.TaskGroup() as tasks:
            asked = [tasks.create_task(_predict(request, instance)) for instance in body.instances]
        answered = [task.result() for task in asked]
        for answer in answered:
            if answer.status != 200:
                return _as_sent(answer)
        return JSONResponse({"predictions": [_text(answer) for answer in answered]})

    router.post("/vertex", **whole(VertexResponse))(vertex)
    if predict_route := environment.get("AIP_PREDICT_ROUTE"):
        router.post(predict_route, response_model=None, include_in_schema=False)(vertex)
    return router


async def _predict(request: Request, instance: dict[str, Any]) -> Answered:
    path = "/v1/chat/completions" if "messages" in instance else "/generate"
    return await ask(request, path, {**instance, "stream": False})


def _text(answer: Answered) -> str:
    told = answer.json()
    return told["generated_text"] if "generated_text" in told else told["choices"][0]["message"]["content"] or ""


def _as_sent(answer: Answered) -> Response:
    response = Response(answer.body, answer.status)
    response.raw_headers[:] = answer.headers
    return response
