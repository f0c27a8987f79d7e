"""Grammar, the plain type: what is checked before anything is compiled."""

import json
from typing import Any

import pytest

from jaxserve.errors import InvalidRequest
from jaxserve.grammar import MAX_CHOICES, MAX_GRAMMAR_BYTES, Grammar, GrammarKind
from jaxserve.request import SamplingParams


def test_equal_texts_are_one_grammar_whatever_field_they_came_from():
    schema = {"type": "object", "properties": {"b": {}, "a": {"const": "é"}}}
    parsed, text = Grammar.json_schema(schema), Grammar.json_schema(json.dumps(schema, indent=2), "guided_json")
    assert parsed == text and hash(parsed) == hash(text) and text.param == "guided_json"
    assert list(json.loads(parsed.text)["properties"]) == ["b", "a"]  # the order of an answer's keys


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"not": schema}
    return schema


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda: Grammar.json_schema("{", "x"), "not valid JSON"),
        (lambda: Grammar.json_schema("[1]", "x"), "must be an object or a boolean"),
        (lambda: Grammar.json_schema('{"minimum": 1e999}', "x"), "not valid JSON"),
        (lambda: Grammar.json_schema('{"not":' * 100_000, "x"), "not valid JSON"),
        (lambda: Grammar.json_schema(nested(500), "x"), "64 deep"),
        (lambda: Grammar.choice([], "x"), "1 to"),
        (lambda: Grammar.choice(["a"] * (MAX_CHOICES + 1), "x"), "1 to"),
        (lambda: Grammar.choice(["a", ""], "x"), "empty strings"),
        (lambda: Grammar.regex("", "x"), "not empty"),
        (lambda: Grammar.ebnf("", "x"), "not empty"),
        (lambda: Grammar.structural_tag([], ["<"], "x"), "structures"),
        (lambda: Grammar.structural_tag([{"begin": "<f>", "end": ""}], ["<"], "x"), "schema"),
        (lambda: Grammar.structural_tag([{"begin": "<f>", "end": "", "schema": {}}], ["<g"], "x"), "triggers"),
    ],
)
def test_what_no_compiler_needs_to_see_is_refused(make: Any, part: str):
    with pytest.raises(InvalidRequest, match=part) as caught:
        make()
    assert caught.value.param == "x"


@pytest.mark.parametrize("text", ["é" * (MAX_GRAMMAR_BYTES // 2 + 1), "half \ud800"])
def test_size_and_unicode_are_checked_with_the_request(text: str):
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(grammar=Grammar(GrammarKind.REGEX, text, "guided_regex")).validate(10)
    assert caught.value.param == "guided_regex"
