"""From a Grammar to llguidance's own form of it. Nothing is compiled, but GBNF and JSON are parsed: bound the time."""

import json
from typing import Any

from llguidance import LLMatcher, StructTag
from llguidance.gbnf_to_lark import any_to_lark

from jaxserve.errors import InvalidRequest
from jaxserve.grammar import JSON_WHITESPACE, Grammar, GrammarKind
from jaxserve.json_schema import quote_references


def translate(grammar: Grammar) -> list[str]:
    """llguidance's form of a grammar.

    Returns:
        one, or several to be tried in this order.

    Raises:
        InvalidRequest: the text is not what its kind says.
    """
    try:
        return _TRANSLATIONS[grammar.kind](grammar.text)
    except InvalidRequest:
        raise
    except Exception as error:  # llguidance's converters raise whatever they stumble over
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error) or type(error).__name__
        raise InvalidRequest(reason) from error


def _json_schema(text: str) -> list[str]:
    schema = json.loads(text)
    if schema is False:
        raise InvalidRequest("no JSON is valid by the schema `false`")
    schema = {} if schema is True else quote_references(schema)
    return [LLMatcher.grammar_from_json_schema(json.dumps(schema, ensure_ascii=False), {"whitespace_pattern": JSON_WHITESPACE})]


def _json_object(_: str) -> list[str]:
    return _json_schema('{"type":"object"}')


def _regex(pattern: str) -> list[str]:
    return [LLMatcher.grammar_from_regex(pattern)]


def _choice(text: str) -> list[str]:
    return _regex("|".join("".join(map(_escaped, choice)) for choice in json.loads(text)))


def _escaped(character: str) -> str:
    return character if character.isalnum() else f"\\x{{{ord(character):x}}}"


def _ebnf(text: str) -> list[str]:
    return [LLMatcher.grammar_from_lark(any_to_lark(text))]


def _structural_tag(text: str) -> list[str]:
    parts: dict[str, Any] = json.loads(text)
    tags = [
        StructTag(
            trigger=max((trigger for trigger in parts["triggers"] if structure["begin"].startswith(trigger)), key=len),
            begin=structure["begin"],
            grammar=json.dumps(structure["schema"], ensure_ascii=False),
            end=structure["end"],
        )
        for structure in parts["structures"]
    ]
    # Whether a trigger such as <tool_call> is one token of the model or a text, the model's vocabulary tells.
    return [LLMatcher.grammar_from_lark(StructTag.to_grammar(tags, assume_special=special)) for special in (True, False)]


_TRANSLATIONS = {
    GrammarKind.JSON_OBJECT: _json_object,
    GrammarKind.JSON_SCHEMA: _json_schema,
    GrammarKind.REGEX: _regex,
    GrammarKind.CHOICE: _choice,
    GrammarKind.EBNF: _ebnf,
    GrammarKind.STRUCTURAL_TAG: _structural_tag,
}
