"""Fields of a request that say what the answer must look like: OpenAI's response_format, vLLM's guided_* and
structured_outputs, and SGLang's json_schema, regex and ebnf."""

from collections.abc import Callable
from typing import Any, Literal

from pydantic import Field

from jaxserve.errors import InvalidRequest
from jaxserve.grammar import Grammar, GrammarKind
from jaxserve.http.body import Body
from jaxserve.http.sampler_fields import Ignored, SamplerFields

JsonSchema = dict[str, Any] | bool


class NamedSchema(Body):
    """OpenAI's name for a schema, and the schema; `strict` changes nothing: every schema is held to."""

    name: str | None = None
    description: str | None = None
    schema_: JsonSchema = Field(default_factory=dict, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """OpenAI's response_format; with `value` TGI's too."""

    type: Literal["text", "json_object", "json_schema", "json", "regex", "structural_tag"]
    json_schema: NamedSchema | None = None
    value: Any = Field(None, description="TGI's: the schema, the regular expression, or {name, schema}.")
    structures: list[dict[str, Any]] | None = None
    triggers: list[str] | None = None

    def grammar(self, param: str) -> Grammar | None:
        """What it asks for; None where that is plain text. Raises InvalidRequest."""
        match self.type:
            case "text":
                return None
            case "json_object" | "json":
                if self.value is None:
                    return Grammar.json_object(param)
                return Grammar.json_schema(self.value, param)
            case "regex":
                return Grammar.regex(self.value, param)
            case "structural_tag":
                return Grammar.structural_tag(self.structures or (), self.triggers or (), param)
        if self.json_schema is not None:
            return Grammar.json_schema(self.json_schema.schema_, param)
        value = self.value.get("schema") if isinstance(self.value, dict) and "schema" in self.value else self.value
        if value is None:
            raise InvalidRequest(f"`{param}.json_schema` is required", f"{param}.json_schema")
        return Grammar.json_schema(value, param)


class StructuredOutputs(Body):
    """vLLM's structured_outputs."""

    json_: JsonSchema | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | None = None
    disable_any_whitespace: bool | None = Field(None, description="JSON has no white space.")
    whitespace_pattern: str | None = Field(None, description="A regular expression of what may stand between two parts of JSON.")
    disable_additional_properties: Any = Field(None, description="Without effect: objects with properties have no others anyway.")
    disable_fallback: Ignored = None

    def value(self, name: str) -> Any:
        """One of the fields, by its name in JSON."""
        return self.json_ if name == "json" else getattr(self, name)


_MAKERS: dict[str, Callable[[Any, str], Grammar]] = {
    "json": Grammar.json_schema,
    "regex": Grammar.regex,
    "choice": Grammar.choice,
    "grammar": Grammar.ebnf,
}
_SGLANG = {"json_schema": "json", "regex": "regex", "ebnf": "grammar"}


class GrammarFields(SamplerFields):
    """The fields; only one of them may be there."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: JsonSchema | str | None = Field(None, description="A JSON schema, or one as a string.")
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = Field(None, description="Lark, or GBNF.")
    guided_decoding_backend: Any = Field(None, description="Accepted without effect.")
    guided_whitespace_pattern: str | None = Field(None, description="As structured_outputs.whitespace_pattern.")
    # SGLang's
    json_schema: JsonSchema | str | None = Field(None, description="As guided_json.")
    regex: str | None = Field(None, description="As guided_regex.")
    ebnf: str | None = Field(None, description="As guided_grammar.")

    def grammar(self) -> Grammar | None:
        """What the answer must match, if anything.

        Raises:
            InvalidRequest: naming the field that is wrong, or two that exclude each other.
        """
        asked = dict(self._asked())
        if len(asked) > 1:
            first, second, *_ = asked
            raise InvalidRequest(f"`{first}` and `{second}` exclude each other", second)
        return self._spaced(next(iter(asked.values()), None))

    def _spaced(self, grammar: Grammar | None) -> Grammar | None:
        """JSON with the white space that is asked for; what is no JSON stays as it is."""
        inner = self.structured_outputs or StructuredOutputs.model_validate({})
        patterns = {
            "structured_outputs.disable_any_whitespace": "" if inner.disable_any_whitespace else None,
            "structured_outputs.whitespace_pattern": inner.whitespace_pattern,
            "guided_whitespace_pattern": self.guided_whitespace_pattern,
        }
        asked = {param: pattern for param, pattern in patterns.items() if pattern is not None}
        if len(asked) > 1:
            first, second, *_ = asked
            raise InvalidRequest(f"`{first}` and `{second}` exclude each other", second)
        for param, pattern in asked.items():
            if grammar is not None and grammar.kind is GrammarKind.STRUCTURAL_TAG:
                raise InvalidRequest(f"`{param}` is not supported with structural tags", param)
            if grammar is not None and grammar.is_json:
                return grammar.spaced(pattern, param)
        return grammar

    def _asked(self) -> list[tuple[str, Grammar]]:
        given = {"response_format": self.response_format and self.response_format.grammar("response_format")}
        inner = self.structured_outputs or StructuredOutputs.model_validate({})
        for name, make in _MAKERS.items():
            for param, value in ((f"guided_{name}", getattr(self, f"guided_{name}")), (f"structured_outputs.{name}", inner.value(name))):
                given[param] = None if value is None else make(value, param)
        for param, name in _SGLANG.items():
            given[param] = None if (value := getattr(self, param)) is None else _MAKERS[name](value, param)
        given["structured_outputs.json_object"] = Grammar.json_object("structured_outputs.json_object") if inner.json_object else None
        given["structured_outputs.structural_tag"] = _structural_tag(inner.structural_tag)
        return [(param, grammar) for param, grammar in given.items() if grammar is not None]


def _structural_tag(text: str | None) -> Grammar | None:
    if text is None:
        return None
    param = "structured_outputs.structural_tag"
    try:
        return ResponseFormat.model_validate_json(text).grammar(param)
    except ValueError as error:
        raise InvalidRequest(f"`{param}` is no structural tag as JSON", param) from error
