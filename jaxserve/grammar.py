"""Grammar: what the text of an answer must match, as it crosses from the front end to the engine. Plain; nothing is compiled here."""

import enum
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from jaxserve.errors import InvalidRequest
from jaxserve.json_schema import read_schema

MAX_GRAMMAR_BYTES = 2**18
MAX_JSON_DEPTH = 64
MAX_CHOICES = 4096
# Between two parts of a JSON text: a space, or a line break and the next line's indentation. JSON allows any number; models have been
# seen to write nothing else for ever.
JSON_WHITESPACE = r" |\r?\n[ \t]{0,24}"
_WHITESPACE_ALONE = re.compile(r"(?:\\[ntrs ]|[ \t\r\n\[\]()|?*+]|\(\?:|\{\d{1,4}(?:,\d{0,4})?\})*")
JSON_OPTIONS = "x-guidance"  # key of a schema's options for llguidance


class GrammarKind(enum.Enum):
    """How a grammar's text is to be read."""

    JSON_OBJECT = "json_object"  # any JSON object; no text
    JSON_SCHEMA = "json_schema"  # a JSON schema, as JSON
    REGEX = "regex"  # a regular expression in the syntax of Rust's crate `regex`; the whole answer matches
    CHOICE = "choice"  # a JSON array of strings, one of which is the answer
    EBNF = "ebnf"  # Lark with llguidance's additions (%json {...}, <|special_token|>), or GBNF, told apart by its `::=`
    STRUCTURAL_TAG = "structural_tag"  # {"structures": [{"begin", "schema", "end"}], "triggers": [...]} as JSON: free text with tagged JSON


@dataclass(frozen=True, slots=True)
class Grammar:
    """A grammar as its text; equal texts are compiled once. The class methods make one and check what can be checked without compiling.

    Attributes:
        kind: how to read the text.
        text: the grammar; at most MAX_GRAMMAR_BYTES of UTF-8.
        param: name of the request's field that it came from, for messages about it; no part of its identity.
    """

    kind: GrammarKind
    text: str = ""
    param: str = field(default="grammar", compare=False)

    @classmethod
    def json_object(cls, param: str = "response_format") -> Self:
        """Any JSON object."""
        return cls(GrammarKind.JSON_OBJECT, "", param)

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | bool | str, param: str = "response_format") -> Self:
        """JSON that a schema accepts, as read_schema() reads it.

        Args:
            schema: parsed, or as JSON text.
            param: see the attribute.

        Raises:
            InvalidRequest: it is no JSON schema: not an object or a boolean, too deep, or not JSON.
        """
        parsed = _parsed(schema, param) if isinstance(schema, str) else schema
        if not isinstance(parsed, Mapping | bool):
            raise InvalidRequest(f"`{param}`: a JSON schema must be an object or a boolean", param)
        _check_depth(parsed, param)
        return cls(GrammarKind.JSON_SCHEMA, _as_json(read_schema(parsed), param), param)

    @classmethod
    def regex(cls, pattern: str, param: str = "regex") -> Self:
        """Text that a regular expression matches as a whole. Raises InvalidRequest where it is empty."""
        return cls(GrammarKind.REGEX, _filled(pattern, param), param)

    @classmethod
    def choice(cls, choices: Sequence[str], param: str = "guided_choice") -> Self:
        """One of some strings.

        Raises:
            InvalidRequest: none, too many, or an empty one.
        """
        if not choices or len(choices) > MAX_CHOICES:
            raise InvalidRequest(f"`{param}` must hold 1 to {MAX_CHOICES} strings. Given: {len(choices)}", param)
        if not all(isinstance(choice, str) and choice for choice in choices):
            raise InvalidRequest(f"`{param}` must not hold empty strings, or anything but strings", param)
        return cls(GrammarKind.CHOICE, _as_json(list(choices), param), param)

    @classmethod
    def ebnf(cls, text: str, param: str = "guided_grammar") -> Self:
        """Text of a context-free grammar, in Lark's notation or GBNF. Raises InvalidRequest where it is empty."""
        return cls(GrammarKind.EBNF, _filled(text, param), param)

    @classmethod
    def structural_tag(cls, structures: Sequence[Mapping[str, Any]], triggers: Sequence[str], param: str = "response_format") -> Self:
        """Free text in which each trigger begins one of some structures, whose inside is JSON.

        Args:
            structures: each with "begin" (text), "schema" (a JSON schema) and "end" (text).
            triggers: texts; the "begin" of every structure starts with one of them.
            param: see the attribute.

        Raises:
            InvalidRequest: a structure lacks a part, or starts with no trigger.
        """
        for structure in structures:
            texts = structure.get("begin"), structure.get("end")
            if not all(isinstance(text, str) for text in texts) or not isinstance(structure.get("schema"), Mapping):
                raise InvalidRequest(f"`{param}`: each structure must have `begin` and `end` (strings) and `schema` (an object)", param)
            if not any(trigger and str(texts[0]).startswith(trigger) for trigger in triggers):
                raise InvalidRequest(f"`{param}`: the `begin` of each structure must start with one of `triggers`", param)
        if not structures:
            raise InvalidRequest(f"`{param}`: `structures` must not be empty", param)
        return cls(GrammarKind.STRUCTURAL_TAG, _as_json({"structures": list(structures), "triggers": list(triggers)}, param), param)

    @property
    def is_json(self) -> bool:
        """Whether all that it accepts is JSON."""
        return self.kind in (GrammarKind.JSON_OBJECT, GrammarKind.JSON_SCHEMA)

    def spaced(self, pattern: str, param: str = "whitespace_pattern") -> "Grammar":
        """The same JSON with other white space.

        It stands in the schema itself, under llguidance's key `x-guidance`, and stays with it where the schema becomes part of a larger
        grammar.

        Args:
            pattern: regular expression of what may stand between two parts of the JSON, where anything does; "": nothing may.
            param: name of the request's field that it came from.

        Raises:
            InvalidRequest: it may match anything but JSON's white space; the answer would be no JSON.
        """
        if not _WHITESPACE_ALONE.fullmatch(pattern):
            raise InvalidRequest(
                f"`{param}` must be a regular expression of white space alone: spaces, \\t, \\r, \\n and \\s, in classes, groups, "
                "alternatives and repetitions",
                param,
            )
        pattern = pattern.replace("\\s", "[ \\t\\r\\n]")  # JSON knows no other
        schema = json.loads(self.text or '{"type":"object"}')
        if schema is False:  # nothing matches it anyway
            return self
        schema = schema if isinstance(schema, dict) else {}
        options = schema.get(JSON_OPTIONS)
        spaced = {**schema, JSON_OPTIONS: {**(options if isinstance(options, dict) else {}), "whitespace_pattern": pattern}}
        return Grammar(GrammarKind.JSON_SCHEMA, _as_json(spaced, self.param), self.param)

    def validate(self) -> None:
        """Check the size, which bounds the work of compiling.

        Raises:
            InvalidRequest: it is too long, or has half a surrogate pair.
        """
        try:
            size = len(self.text.encode())
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"`{self.param}` is not valid Unicode: {error.reason} at character {error.start}", self.param) from error
        if size > MAX_GRAMMAR_BYTES:
            raise InvalidRequest(f"`{self.param}` supports grammars of up to {MAX_GRAMMAR_BYTES} bytes", self.param)


def _filled(text: str, param: str) -> str:
    if not isinstance(text, str) or not text:
        raise InvalidRequest(f"`{param}` must be a string that is not empty", param)
    return text


def _parsed(text: str, param: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise InvalidRequest(f"`{param}` is not valid JSON: {reason}", param) from error


def _as_json(value: Any, param: str) -> str:
    """JSON text of a value, keys in the order given: it is the order in which an answer has them."""
    _check_depth(value, param)
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (ValueError, TypeError) as error:
        raise InvalidRequest(f"`{param}` is not valid JSON: {error}", param) from error


def _check_depth(value: Any, param: str) -> None:
    if _depth(value) > MAX_JSON_DEPTH:
        raise InvalidRequest(f"`{param}` may be nested {MAX_JSON_DEPTH} deep at most", param)


def _depth(value: Any) -> int:
    """How deep lists and objects are nested in each other; no recursion, and no more than is needed to see that it is too deep."""
    depth, level = 0, [value]
    while level and depth <= MAX_JSON_DEPTH:
        level = [
            inner
            for outer in level
            if isinstance(outer, Mapping | list | tuple)
            for inner in (outer.values() if isinstance(outer, Mapping) else outer)
        ]
        depth += 1
    return depth
