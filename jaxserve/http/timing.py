"""TGI's response headers: what an answer cost."""

import os
from collections.abc import Sequence

from jaxserve.config import parse_mesh
from jaxserve.http.answer import Answer, Answers
from jaxserve.http.service import Service


def compute_type(service: Service) -> str:
    """TGI's x-compute-type: $COMPUTE_TYPE, else number and name of the devices."""
    data, tensor = parse_mesh(service.info.mesh)
    return os.environ.get("COMPUTE_TYPE") or f"{data * tensor}-{service.info.device.lower().replace(' ', '-')}"


def stream_headers(service: Service, num_characters: int) -> dict[str, str]:
    """What is known before the first token."""
    return {"x-compute-type": compute_type(service), "x-compute-characters": str(num_characters)}


def timing_headers(service: Service, answers: Answers, num_characters: int, told: Sequence[Answer] = ()) -> dict[str, str]:
    """What is known at the end: the longest times of the answers, in milliseconds, and their tokens together.

    Args:
        num_characters: of the prompts.
        told: those whose tokens count; all unless given.
    """
    times = [answer.times for answer in answers.answers]
    total, inference = max(each.total for each in times), max(each.inference for each in times)
    counted = told or answers.answers
    num_tokens = sum(sample.num_tokens for answer in counted for sample in answer.samples)
    milliseconds = {
        "x-total-time": total,
        "x-validation-time": max(each.validation for each in times),
        "x-queue-time": max(each.queue for each in times),
        "x-inference-time": inference,
        "x-time-per-token": inference / max(num_tokens, 1),
    }
    return {
        **stream_headers(service, num_characters),
        "x-compute-time": f"{total:.6f}",
        **{name: str(round(1000 * value)) for name, value in milliseconds.items()},
        "x-prompt-tokens": str(sum(len(answer.request.prompt_token_ids) for answer in counted)),
        "x-generated-tokens": str(num_tokens),
    }
