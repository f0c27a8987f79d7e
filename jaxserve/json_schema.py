"""JSON schemas as those mean them who write them for language models, in terms of what JSON Schema says.

A schema with `properties` is an object with these and no others. JSON Schema would accept a number there, too, or further properties, and a
model that may go on does. TGI and vLLM read schemas so as well: outlines-core's to_regex looks for `properties` before all else, and
xgrammar's strict_mode is on unless its caller says otherwise, which vLLM's backend_xgrammar.py does not. What a schema says itself about
further properties counts. Unlike xgrammar in that mode, this closes no array behind its `prefixItems`, and no object that several schemas
speak of.
"""

from typing import Any
from urllib.parse import quote

_MAPS = frozenset({"properties", "patternProperties", "$defs", "definitions"})
_LISTS = frozenset({"anyOf", "oneOf", "allOf", "prefixItems"})
_SINGLE = frozenset({"items", "additionalProperties"})
# What is said of further properties, or asks for some.
_OPEN = frozenset({"additionalProperties", "patternProperties", "unevaluatedProperties", "minProperties", "propertyNames"})
# Keywords by which several schemas speak of one value: if one of them names all properties, there is no room for those of the others.
_SEVERAL = frozenset({"allOf", "anyOf", "oneOf", "$ref", "not", "if", "dependentSchemas", "dependentRequired"})

_URI_CHARACTERS = "%:/?#@!$&'()*+,;=-._~"
_PLAIN_VALUES = frozenset({"const", "enum", "default", "examples"})


def read_schema(schema: Any) -> Any:
    """A schema that accepts what is meant; all that it accepts is accepted by the given one.

    Args:
        schema: parsed JSON, not nested too deeply for a recursion; what is no schema stays as it is.
    """
    return _read(schema, closes=not _overlap(schema))


def quote_references(schema: Any) -> Any:
    """A schema whose references are URIs: names in them that people wrote as they are ("#/$defs/tree node") are escaped."""
    if isinstance(schema, list):
        return [quote_references(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: quote(value, safe=_URI_CHARACTERS)
        if key == "$ref" and isinstance(value, str)
        else value
        if key in _PLAIN_VALUES
        else quote_references(value)
        for key, value in schema.items()
    }


def _parts(schema: dict[str, Any]) -> list[Any]:
    """The schemas right inside a schema."""
    found = []
    for key, value in schema.items():
        if key in _MAPS and isinstance(value, dict):
            found += value.values()
        elif key in _LISTS and isinstance(value, list):
            found += value
        elif key in _SINGLE:
            found.append(value)
    return found


def _overlap(schema: Any) -> bool:
    """Whether several schemas with properties may speak of one value."""
    if not isinstance(schema, dict):
        return False
    together = schema.get("allOf")
    if "if" in schema or "not" in schema or (isinstance(together, list) and len(together) > 1):
        return True
    if "properties" in schema and not _SEVERAL.isdisjoint(schema):
        return True
    return any(map(_overlap, _parts(schema)))


def _read(schema: Any, closes: bool) -> Any:
    if not isinstance(schema, dict):
        return schema
    read: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _MAPS and isinstance(value, dict):
            read[key] = {name: _read(each, closes) for name, each in value.items()}
        elif key in _LISTS and isinstance(value, list):
            read[key] = [_read(each, closes) for each in value]
        else:
            read[key] = _read(value, closes) if key in _SINGLE else value
    properties, required = schema.get("properties"), schema.get("required", [])
    if not isinstance(properties, dict) or not isinstance(required, list):
        return read
    read.setdefault("type", "object")
    if closes and _OPEN.isdisjoint(schema) and all(isinstance(name, str) and name in properties for name in required):
        read["additionalProperties"] = False
    return read
