"""A grammar for what follows the reasoning of a thinking model."""

import json
from typing import Any

from jaxserve.grammar import Grammar, GrammarKind

# Between two parts of a JSON text; models have been seen to write nothing but white space for ever.
_WHITESPACE = r" |\r?\n[ \t]{0,24}"


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
    match grammar.kind:
        case GrammarKind.JSON_OBJECT:
            body = _json({"type": "object"})
        case GrammarKind.JSON_SCHEMA:
            body = _json(json.loads(grammar.text))
        case GrammarKind.REGEX:
            body = "/" + grammar.text.replace("\\/", "/").replace("/", "\\/") + "/"
        case GrammarKind.CHOICE:
            body = " | ".join(json.dumps(choice) for choice in json.loads(grammar.text))
        case _:
            return None
    return Grammar(GrammarKind.EBNF, after_reasoning("answer", reasoning) + f"\nanswer: {body}", grammar.param)


def _json(schema: Any) -> str:
    schema = {} if schema is True else schema
    options = {"x-guidance": {"whitespace_pattern": _WHITESPACE}}
    return f"%json {json.dumps({**schema, **options} if isinstance(schema, dict) else schema)}"
