"""Tool calls as a grammar in llguidance's Lark: what enforces tool_choice `required` and that of one function."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxserve.chat_output.constrained import after_reasoning
from jaxserve.chat_output.formats import HERMES, LLAMA3_JSON, MISTRAL, ToolFormat
from jaxserve.errors import InvalidRequest


def tool_grammar(
    tool_format: ToolFormat, tools: Sequence[tuple[str, Mapping[str, Any]]], parallel: bool, marker_id: int | None, reasoning: str
) -> str:
    """A grammar of answers that are one or more calls of the tools and nothing else.

    Args:
        tools: name and JSON schema of the arguments of each function that may be called.
        parallel: several calls are possible.
        marker_id: the format's marker where it is a token of its own.
        reasoning: see MessageParser; the calls follow it.

    Raises:
        InvalidRequest: the schema of a function's arguments is none.
    """
    if tool_format is HERMES:
        begin, end, separator, key = '"\\n"', '"\\n</tool_call>"', '"\\n"', "arguments"
    elif tool_format is MISTRAL:
        begin, end, separator, key = "", "", '", "', "arguments"
    elif tool_format is LLAMA3_JSON:
        begin, end, separator, key = "", "", '"; "', "parameters"
    else:
        return _pythonic(tools, parallel, reasoning)
    marker = json.dumps(tool_format.marker) if marker_id is None else f"(<[{marker_id}]> | {json.dumps(tool_format.marker)})"
    each = f"{marker} {begin}" if tool_format is HERMES else ""
    calls = f"call ({separator} call)*" if parallel else "call"
    if tool_format is MISTRAL:
        calls = f'{marker} "[" {calls} "]"'
    rules = [after_reasoning(calls, reasoning), f"call: {each} ({' | '.join(f'call_{i}' for i in range(len(tools)))}) {end}"]
    for i, (name, schema) in enumerate(tools):
        head = json.dumps(f'{{"name": {json.dumps(name)}, "{key}": ')
        rules += [f'call_{i}: {head} arguments_{i} "}}"', f"arguments_{i}: %json {_compact(schema)}"]
    return "\n".join(rules)


def _compact(schema: Any) -> str:
    """A schema whose values have white space only where people put it: models may else write nothing else for ever."""
    if isinstance(schema, Mapping):
        schema = {**schema, "x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}}
    return json.dumps(schema)


def _pythonic(tools: Sequence[tuple[str, Mapping[str, Any]]], parallel: bool, reasoning: str) -> str:
    calls = 'call (", " call)*' if parallel else "call"
    rules = [after_reasoning(f'"[" {calls} "]"', reasoning), f"call: {' | '.join(f'call_{i}' for i in range(len(tools)))}"]
    for i, (name, schema) in enumerate(tools):
        properties = schema.get("properties") or {}
        required = schema.get("required") or ()
        if not isinstance(properties, Mapping) or not isinstance(required, Sequence):
            raise InvalidRequest(f"the parameters of `{name[:64]}` are no JSON schema: `properties` or `required` is malformed", "tools")
        shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        arguments: list[str] = []
        for j, (argument, inner) in enumerate(properties.items()):
            rules.append(f"value_{i}_{j}: %json {_compact({**shared, **inner} if isinstance(inner, Mapping) else inner)}")
            arguments.append(f"{json.dumps(argument + '=')} value_{i}_{j}")
        rules += _arguments(f"arguments_{i}", arguments, [argument in required for argument in properties])
        rules.append(f'call_{i}: {json.dumps(name + "(")} arguments_{i} ")"')
    return "\n".join(rules)


def _arguments(rule: str, arguments: Sequence[str], required: Sequence[bool]) -> list[str]:
    """Rules of a list, in order, with commas between; one that is not required may be left out."""
    rules = [f"{rule}: {rule}_0", f'{rule}_{len(arguments)}: ""', f'{rule}_more_{len(arguments)}: ""']
    for j, argument in enumerate(arguments):
        for more, before in (("", ""), ("more_", '", " ')):
            taken = f"{before}{argument} {rule}_more_{j + 1}"
            rules.append(f"{rule}_{more}{j}: {taken}" + ("" if required[j] else f" | {rule}_{more}{j + 1}"))
    return rules
