"""A seeded generator of JSON schemas as people write them: nested objects, arrays, enums, references, Unicode, bounds, formats."""

import random
from typing import Any

NAMES = ["name", "age", "tags", "naïve café", "日本語", "emoji 😀", 'quo"te', "back\\slash", "a/b~c", "$id2", "x", "is_ok", "Größe", "π"]
VALUES: list[Any] = ["red", "grün", "日本", "😀👍", 'say "hi"', "tab\there", "a/b", "", 0, -7, 3.5, True, None, "null"]
PATTERNS = ["^[A-Z]{3}-[0-9]{2,4}$", "^(yes|no|möglich)$", "^\\d{3}\\.\\d$", "^[a-f]{1,6}x?$"]
FORMATS = ["date", "uuid", "ipv4", "time", "date-time"]


def random_schema(rng: random.Random) -> dict[str, Any]:
    """An object schema, sometimes with definitions, one of which may hold itself."""
    definitions: dict[str, Any] = {}
    if rng.random() < 0.4:
        definitions["item"] = _schema(rng, 1, [])
        node = _object(rng, 1, [])
        node["properties"]["child"] = {"anyOf": [{"$ref": "#/$defs/tree nöde"}, {"type": "null"}]}
        definitions["tree nöde"] = node
    schema = _object(rng, 3, sorted(definitions))
    return schema | ({"$defs": definitions} if definitions else {})


def _schema(rng: random.Random, depth: int, definitions: list[str]) -> dict[str, Any]:
    kinds = [_string, _string, _integer, _number, _enum, _boolean]
    if definitions and rng.random() < 0.3:
        return {"$ref": "#/$defs/" + rng.choice(definitions)}
    if depth > 0:
        kinds += [_object, _object, _array, _array, _any_of]
    kind = rng.choice(kinds)
    return kind(rng, depth - 1, definitions)


def _object(rng: random.Random, depth: int, definitions: list[str]) -> dict[str, Any]:
    names = rng.sample(NAMES, rng.randint(1, 4))
    schema: dict[str, Any] = {"type": "object", "properties": {name: _schema(rng, depth, definitions) for name in names}}
    schema["required"] = [name for name in names if rng.random() < 0.7]
    if rng.random() < 0.94:  # a model that knows no words finds no end of names
        schema["additionalProperties"] = False
    elif rng.random() < 0.5:
        schema["additionalProperties"] = {"type": "integer"}
    return schema


def _array(rng: random.Random, depth: int, definitions: list[str]) -> dict[str, Any]:
    low = rng.randint(0, 2)
    schema: dict[str, Any] = {"type": "array", "items": _schema(rng, depth, definitions), "maxItems": low + rng.randint(0, 3)}
    if low:
        schema["minItems"] = low
    if rng.random() < 0.2:
        schema["prefixItems"] = [_schema(rng, 0, definitions)]
        schema["maxItems"] += 1
    return schema


def _any_of(rng: random.Random, depth: int, definitions: list[str]) -> dict[str, Any]:
    return {"anyOf": [_schema(rng, depth, definitions) for _ in range(rng.randint(2, 3))]}


def _string(rng: random.Random, depth: int, definitions: list[str]) -> dict[str, Any]:
    choice = rng.random()
    if choice < 0.2:
        return {"type": "string", "pattern": rng.choice(PATTERNS)}
    if choice < 0.35:
        return {"type": "string", "format": rng.choice(FORMATS)}
    low = rng.randint(0, 4)
    return {"type": "string", "minLength": low, "maxLength": low + rng.randint(0, 12)}


def _integer(rng: random.Random, depth: int, definitions: list[str]) -> dict[str, Any]:
    low = rng.randint(-1000, 1000)
    schema: dict[str, Any] = {"type": "integer"}
    if rng.random() < 0.7:
        schema[rng.choice(["minimum", "exclusiveMinimum"])] = low
        schema[rng.choice(["maximum", "exclusiveMaximum"])] = low + rng.randint(2, 5000)
    return schema


def _number(rng: random.Random, depth: int, definitions: list[str]) -> dict[str, Any]:
    low = round(rng.uniform(-50, 50), 2)
    return {"type": "number", "minimum": low, "exclusiveMaximum": round(low + rng.uniform(0.5, 100), 2)}


def _enum(rng: random.Random, depth: int, definitions: list[str]) -> dict[str, Any]:
    return {"const": rng.choice(VALUES)} if rng.random() < 0.2 else {"enum": rng.sample(VALUES, rng.randint(1, 5))}


def _boolean(rng: random.Random, depth: int, definitions: list[str]) -> dict[str, Any]:
    return {"type": rng.choice([["boolean"], ["boolean", "null"], ["null"]])}
