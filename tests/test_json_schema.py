"""What JSON schemas mean to those who write them for language models."""

import json
from typing import Any

import pytest

from jaxserve.grammar import Grammar
from jaxserve.json_schema import read_schema


@pytest.mark.parametrize(
    ("schema", "read"),
    [
        # An example of TGI's documentation: nothing but `properties`
        ({"properties": {"a": {}}}, {"properties": {"a": {}}, "type": "object", "additionalProperties": False}),
        (
            {"$defs": {"properties": {"properties": {"properties": {"type": "null"}}}}, "items": {"$ref": "#/$defs/properties"}},
            {
                "$defs": {"properties": {"properties": {"properties": {"type": "null"}}, "type": "object", "additionalProperties": False}},
                "items": {"$ref": "#/$defs/properties"},
            },
        ),
        # What says itself which other properties there are
        ({"properties": {}, "additionalProperties": {"properties": {}}, "type": ["object", "null"]}, None),
        ({"properties": {}, "patternProperties": {}}, {"properties": {}, "patternProperties": {}, "type": "object"}),
        ({"properties": {"a": {}}, "required": ["b"]}, {"properties": {"a": {}}, "required": ["b"], "type": "object"}),
        ({"properties": {"a": {}}, "minProperties": 2}, {"properties": {"a": {}}, "minProperties": 2, "type": "object"}),
        # Several schemas of one object: none of them may close it
        (
            {"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]},
            {"allOf": [{"properties": {"a": {}}, "type": "object"}, {"properties": {"b": {}}, "type": "object"}]},
        ),
        (
            {"properties": {"a": {}}, "anyOf": [{"required": ["a"]}]},
            {"properties": {"a": {}}, "anyOf": [{"required": ["a"]}], "type": "object"},
        ),
        # Values, and what is no schema
        ({"const": {"properties": {}}}, {"const": {"properties": {}}}),
        ({"properties": 1, "required": [[]], "allOf": 2, "items": True}, {"properties": 1, "required": [[]], "allOf": 2, "items": True}),
        (True, True),
    ],
)
def test_schemas_are_read_as_they_are_meant(schema: Any, read: Any):
    if read is None:
        read = {**schema, "additionalProperties": {"properties": {}, "type": "object", "additionalProperties": False}}
    before = json.dumps(schema)
    assert read_schema(schema) == read and json.dumps(schema) == before
    assert json.loads(Grammar.json_schema(schema).text) == read
