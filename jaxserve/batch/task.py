"""A line that was read: what to generate for it, and how its answer or its refusal looks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError

from jaxserve.errors import InvalidRequest
from jaxserve.http.errors import field_error
from jaxserve.llm import Prompt, RequestOutput
from jaxserve.request import SamplingParams

Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Task:
    """Prompts that are answered together, in one record.

    Attributes:
        prompts: at least one.
        answer: from one output a prompt to the record.
        refuse: from what is wrong with a prompt to the record.
    """

    prompts: list[Prompt]
    params: SamplingParams
    answer: Callable[[list[RequestOutput]], Record]
    refuse: Callable[[InvalidRequest], Record]


def read_body[B: BaseModel](kind: type[B], fields: Mapping[str, Any]) -> B:
    """Validate an object against its class.

    Raises:
        InvalidRequest: naming the first field that is wrong.
    """
    try:
        return kind.model_validate(dict(fields))
    except ValidationError as error:
        told = field_error(RequestValidationError([{**each, "loc": ("body", *each["loc"])} for each in error.errors()]))
        raise told if isinstance(told, InvalidRequest) else InvalidRequest(str(told)) from None
