"""The input of a response as /v1/responses/ID/input_items tells it: items with ids, and pages of them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxserve.errors import InvalidRequest
from jaxserve.http.response_items import new_id

MAX_PAGE = 100
_MAX_ID_CHARACTERS = 256
_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc", "function_call_output": "fco"}


def input_items(given: str | Sequence[Mapping[str, Any]], earlier: Iterable[Mapping[str, Any]] = ()) -> list[dict[str, Any]]:
    """Items as OpenAI tells them: with ids, and contents in parts.

    Args:
        given: an input that `responses_types.messages_of` has accepted.
        earlier: items before it; an id that one of them has, or that comes twice, is given anew: ids are places in the list.
    """
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    taken = {item["id"] for item in earlier}
    items = []
    for item in given:
        kind = item.get("type", "message")
        name = item.get("id")
        if not isinstance(name, str) or not 0 < len(name) <= _MAX_ID_CHARACTERS or name in taken:
            name = new_id(_PREFIXES[kind])
        taken.add(name)
        items.append({"id": name, "type": kind, "status": "completed", **_FIELDS[kind](item)})
    return items


def page(items: Sequence[Mapping[str, Any]], limit: int, newest_first: bool, after: str | None) -> dict[str, Any]:
    """Part of a list in OpenAI's words.

    Args:
        items: the oldest first.
        limit: items at most, from 1 to MAX_PAGE.
        newest_first: the order in which they are told.
        after: id of the item before the first one.

    Raises:
        InvalidRequest: there is no such item, or the limit is out of bounds.
    """
    if not 1 <= limit <= MAX_PAGE:
        raise InvalidRequest(f"`limit` must be >= 1 and <= {MAX_PAGE}. Given: {limit}", "limit")
    ordered = list(reversed(items)) if newest_first else list(items)
    start = 0
    if after is not None:
        start = next((place + 1 for place, item in enumerate(ordered) if item["id"] == after), 0)
        if not start:
            raise InvalidRequest("`after` must be the id of one of the items", "after")
    told = ordered[start : start + limit]
    first, last = (told[0]["id"], told[-1]["id"]) if told else (None, None)
    return {"object": "list", "data": told, "first_id": first, "last_id": last, "has_more": start + limit < len(ordered)}


def _message(item: Mapping[str, Any]) -> dict[str, Any]:
    kind = "output_text" if item["role"] == "assistant" else "input_text"
    return {"role": item["role"], "content": _parts(item.get("content"), kind)}


def _reasoning(item: Mapping[str, Any]) -> dict[str, Any]:
    return {"summary": _thoughts(item.get("summary"), "summary_text"), "content": _thoughts(item.get("content"), "reasoning_text")}


def _thoughts(parts: Any, kind: str) -> list[dict[str, Any]]:
    """Only the texts that the model is told have been checked: where there is a content, nobody has read the summary."""
    texts = [part.get("text") for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
    return [{"type": kind, "text": text} for text in texts if isinstance(text, str)]


def _call(item: Mapping[str, Any]) -> dict[str, Any]:
    return {name: item[name] for name in ("call_id", "name", "arguments")}


def _call_output(item: Mapping[str, Any]) -> dict[str, Any]:
    output = item.get("output")
    return {"call_id": item["call_id"], "output": output if isinstance(output, str) else _parts(output, "input_text")}


_FIELDS = {"message": _message, "reasoning": _reasoning, "function_call": _call, "function_call_output": _call_output}


def _parts(content: Any, kind: str) -> list[dict[str, Any]]:
    told = []
    for part in [{"text": content}] if isinstance(content, str) else content:
        if part.get("type") == "refusal":
            told.append({"type": "refusal", "refusal": part["refusal"]})
        else:
            more = {"annotations": [], "logprobs": []} if kind == "output_text" else {}
            told.append({"type": kind, "text": part["text"], **more})
    return told
