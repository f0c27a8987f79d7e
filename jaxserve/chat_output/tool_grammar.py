"""Tool calls as a grammar in llguidance's Lark: what enforces tool_choice `required` and one function, and calls beside another grammar."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxserve.chat_output.constrained import after_reasoning, json_body, json_schema, rule_body
from jaxserve.chat_output.formats import HERMES, LLAMA3_JSON, MISTRAL, ToolFormat
from jaxserve.errors import InvalidRequest
from jaxserve.grammar import JSON_OPTIONS, Grammar, GrammarKind
from jaxserve.json_schema import quote_references, read_schema

FunctionSchema = tuple[str, Mapping[str, Any]]


def tool_grammar(tool_format: ToolFormat, tools: Sequence[FunctionSchema], parallel: bool, marker_id: int | None, reasoning: str) -> str:
    """A grammar of answers that are one or more calls of the tools and nothing else.

    Args:
        tools: name and JSON schema of the arguments of each function that may be called.
        parallel: several calls are possible.
        marker_id: the format's marker where it is a token of its own.
        reasoning: see MessageParser; the calls follow it.

    Raises:
        InvalidRequest: the schema of a function's arguments is none.
    """
    body, rules = _calls(tool_format, tools, parallel, marker_id)
    return "\n".join([after_reasoning(body, reasoning), *rules])


def answer_or_calls(
    answer: Grammar, tool_format: ToolFormat, tools: Sequence[FunctionSchema], parallel: bool, marker_id: int | None, reasoning: str
) -> Grammar | None:
    """A grammar of answers that are either what another grammar says or calls of the tools; None where that has a form (GBNF,
    structural tags) that cannot stand inside another.

    Args and errors are tool_grammar's. In Llama's format there can be one call only: the answer may be JSON, as the calls are, so that
    both are alternatives of one JSON schema. (Rules that begin alike would be told apart too early: llguidance's lexer takes the
    longest literal, and `{"name": "` is one.)
    """
    body = rule_body(answer)
    if body is None:
        return None
    if tool_format is LLAMA3_JSON and answer.is_json:
        either, rules = "answer", [f"answer: {json_body(_any_of(json_schema(answer), tools))}"]
    else:
        calls, rules = _calls(tool_format, tools, parallel, marker_id)
        either, rules = f"(answer | {calls})", [f"answer: {body}", *rules]
    return Grammar(GrammarKind.EBNF, "\n".join([after_reasoning(either, reasoning), *rules]), f"{answer.param} with tools")


def _calls(tool_format: ToolFormat, tools: Sequence[FunctionSchema], parallel: bool, marker_id: int | None) -> tuple[str, list[str]]:
    """The right side of a rule, and the rules it needs."""
    if tool_format is HERMES:
        begin, end, separator, key = '"\\n"', '"\\n</tool_call>"', '"\\n"', "arguments"
    elif tool_format is MISTRAL:
        begin, end, separator, key = "", "", '", "', "arguments"
    elif tool_format is LLAMA3_JSON:
        begin, end, separator, key = "", "", '"; "', "parameters"
    else:
        return _pythonic_calls(tools, parallel)
    marker = _marker(tool_format, marker_id)
    each = f"{marker} {begin}" if tool_format is HERMES else ""
    calls = f"call ({separator} call)*" if parallel else "call"
    if tool_format is MISTRAL:
        calls = f'{marker} "[" {calls} "]"'
    rules = [f"call: {each} ({' | '.join(f'call_{i}' for i in range(len(tools)))}) {end}"]
    for i, (name, schema) in enumerate(tools):
        head = json.dumps(f'{{"name": {json.dumps(name)}, "{key}": ')
        rules += [f'call_{i}: {head} arguments_{i} "}}"', f"arguments_{i}: %json {_compact(schema)}"]
    return calls, rules


def _marker(tool_format: ToolFormat, marker_id: int | None) -> str:
    text = json.dumps(tool_format.marker)
    return text if marker_id is None else f"(<[{marker_id}]> | {text})"


def _any_of(answer: Any, tools: Sequence[FunctionSchema]) -> Mapping[str, Any]:
    """A schema of the answer and of Llama's calls; each finds its own references in its own place."""
    options = {JSON_OPTIONS: answer[JSON_OPTIONS]} if isinstance(answer, dict) and JSON_OPTIONS in answer else {}
    places = {"answer": answer} | {f"tool_{i}": read_schema(schema) for i, (_, schema) in enumerate(tools)}
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, "parameters": {"$ref": f"#/$defs/tool_{i}"}},
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for i, (name, _) in enumerate(tools)
    ]
    moved = {name: _moved(schema, f"#/$defs/{name}") for name, schema in places.items()}
    return {"anyOf": [{"$ref": "#/$defs/answer"}, *calls], "$defs": moved, **options}


def _moved(schema: Any, place: str) -> Any:
    """A schema whose references to its own parts are right where it stands in another one."""
    if isinstance(schema, list):
        return [_moved(each, place) for each in schema]
    if not isinstance(schema, Mapping):
        return schema
    return {
        key: place + value[1:]
        if key == "$ref" and isinstance(value, str) and value.startswith("#")
        else value
        if key in ("const", "enum", "default", "examples")
        else _moved(value, place)
        for key, value in schema.items()
        if key not in ("$schema", "$id") or not isinstance(value, str)
    }


def _compact(schema: Any) -> str:
    """A schema whose values have white space only where people put it: models may else write nothing else for ever."""
    if isinstance(schema, Mapping):
        schema = {**read_schema(schema), "x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}}
    return json.dumps(quote_references(schema))


def _pythonic_calls(tools: Sequence[FunctionSchema], parallel: bool) -> tuple[str, list[str]]:
    calls = 'call (", " call)*' if parallel else "call"
    rules = [f"call: {' | '.join(f'call_{i}' for i in range(len(tools)))}"]
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
    return f'"[" {calls} "]"', rules


def _arguments(rule: str, arguments: Sequence[str], required: Sequence[bool]) -> list[str]:
    """Rules of a list, in order, with commas between; one that is not required may be left out."""
    rules = [f"{rule}: {rule}_0", f'{rule}_{len(arguments)}: ""', f'{rule}_more_{len(arguments)}: ""']
    for j, argument in enumerate(arguments):
        for more, before in (("", ""), ("more_", '", " ')):
            taken = f"{before}{argument} {rule}_more_{j + 1}"
            rules.append(f"{rule}_{more}{j}: {taken}" + ("" if required[j] else f" | {rule}_{more}{j + 1}"))
    return rules
