"""A grammar for what follows the reasoning of a thinking model."""

import json
import re
from typing import Any

from jaxserve.grammar import JSON_OPTIONS, JSON_WHITESPACE, Grammar, GrammarKind
from jaxserve.json_schema import quote_references

_LARK = re.compile(r"(?m)^\s*(%llguidance\b|start\s*:)")


def after_reasoning(body: str, reasoning: str) -> str:
    """Lark's rule `start` for a body that follows the reasoning.

    Args:
        body: the right side of a rule.
        reasoning: see MessageParser: the answer begins within it, may begin with it, or has none.
    """
    if not reasoning:
        return f"start: {body}"
    begin, thought = ("", "thought") if reasoning == "begun" else ('"<think>" ', "thought?")
    return f'start: {thought} {body}\nthought: {begin}inside /\\n{{0,2}}/\ninside[lazy]: /(?s:.*)/ "</think>"'


def constrained_answer(grammar: Grammar, reasoning: str) -> Grammar | None:
    """The grammar of a whole answer from that of what follows the reasoning; None where it has a form that cannot be put into another."""
    if not reasoning:
        return grammar
    body = rule_body(grammar)
    if body is None:
        return None
    return Grammar(GrammarKind.EBNF, f"{after_reasoning('answer', reasoning)}\nanswer: {body}", grammar.param)


def rule_body(grammar: Grammar) -> str | None:
    """A grammar as the right side of a rule in Lark; None where it has a form that cannot be put into another."""
    match grammar.kind:
        case GrammarKind.JSON_OBJECT | GrammarKind.JSON_SCHEMA:
            return json_body(json_schema(grammar))
        case GrammarKind.REGEX:
            return "/" + grammar.text.replace("\\/", "/").replace("/", "\\/") + "/"
        case GrammarKind.CHOICE:
            return " | ".join(json.dumps(choice) for choice in json.loads(grammar.text))
        case GrammarKind.EBNF if _LARK.search(grammar.text):  # GBNF cannot stand inside Lark
            return f"%lark {{\n{grammar.text}\n}}"
    return None


def json_schema(grammar: Grammar) -> Any:
    """The schema of a grammar that is JSON."""
    return {"type": "object"} if grammar.kind is GrammarKind.JSON_OBJECT else json.loads(grammar.text)


def json_body(schema: Any) -> str:
    """JSON that a schema accepts, as the right side of a rule in Lark."""
    schema = {} if schema is True else schema
    if isinstance(schema, dict):
        own = schema.get(JSON_OPTIONS)
        schema = {
            **quote_references(schema),
            JSON_OPTIONS: {"whitespace_pattern": JSON_WHITESPACE, **(own if isinstance(own, dict) else {})},
        }
    return f"%json {json.dumps(schema)}"
