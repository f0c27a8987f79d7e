"""Answers taken apart: the same message for every cutting of the text, and no text lost that is no tool call."""

import json
import random
from dataclasses import dataclass, field
from typing import Any

import llguidance
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.chat_output import (
    TOOL_CALL_PARSERS,
    MessageParser,
    answer_or_calls,
    choose_reasoning_parser,
    choose_tool_format,
    constrained_answer,
    reasoning_state,
    tool_grammar,
)
from jaxserve.errors import InvalidRequest
from jaxserve.grammar import Grammar

PARSERS = ("hermes", "llama3_json", "mistral", "pythonic")
NAMES = ("get_weather", "now", "f", "ns.sub-name")


@dataclass
class Joined:
    content: str = ""
    reasoning: str = ""
    calls: list[list[str]] = field(default_factory=list)


def joined(pieces: list[str], parser: str | None, reasoning: str = "", parallel: bool = True, alone: bool = False) -> Joined:
    message, told = MessageParser(TOOL_CALL_PARSERS[parser] if parser else None, NAMES, reasoning, parallel, alone), Joined()
    for place, piece in enumerate(pieces):
        delta = message.push(piece, last=place == len(pieces) - 1)
        told.content += delta.content
        told.reasoning += delta.reasoning
        for call in delta.tool_calls:
            if call.name is not None:
                assert call.index == len(told.calls)
                told.calls.append([call.name, ""])
            told.calls[call.index][1] += call.arguments
    assert message.num_calls == len(told.calls)
    return told


HERMES = [
    ('<tool_call>\n{"name": "f", "arguments": {"a": [1, {"b": "}"}], "c": "\\"<tool_call>"}}\n</tool_call>', "",
     [("f", {"a": [1, {"b": "}"}], "c": '"<tool_call>'})]),
    ('Let me see. \n\n<tool_call>{"name": "f", "arguments": {}}</tool_call>\n<tool_call>{"name": "now"}</tool_call>\n', "Let me see.",
     [("f", {}), ("now", {})]),
    ('<tool_call>{"arguments": {"x": "é😀\\u00e9"}, "name": "f"}</tool_call> done', " done", [("f", {"x": "é😀é"})]),
    ('<tool_call>{"name": "unknown", "arguments": "{\\"x\\": 1}"}', "", [("unknown", {"x": 1})]),
    ('<tool_call>{"type": "function", "function": {"name": "f", "parameters": {"x": 1}}, "id": "7"}</tool_call>', "", [("f", {"x": 1})]),
    ('<tool_call>{"name": "f", "arguments": {"text": "two\nlines\tand a tab"}}</tool_call>', "",
     [("f", {"text": "two\nlines\tand a tab"})]),
    ('<tool_call>{"name": "f", "arguments": null}</tool_call>', "", [("f", {})]),
    ('a < b <tool_ca> <tool_call> {"nam', 'a < b <tool_ca> <tool_call> {"nam', []),
    ('<tool_call>nonsense</tool_call> <tool_call>{"name": "f"}</tool_call>', "<tool_call>nonsense</tool_call>", [("f", {})]),
    ('<tool_call>{"name": 7, "arguments": {}}</tool_call>', '<tool_call>{"name": 7, "arguments": {}}</tool_call>', []),
    ("plain text \n", "plain text \n", []),
    ("", "", []),
]  # fmt: skip
LLAMA3 = [
    ('{"name": "f", "parameters": {"a": "{\\"x"}}', "", [("f", {"a": '{"x'})]),
    (' <|python_tag|>{"type": "function", "name": "f", "parameters": {}}', "", [("f", {})]),
    ('{"name": "f", "parameters": {"a": 1}}; {"name": "now", "parameters": {}}', "", [("f", {"a": 1}), ("now", {})]),
    ('[{"name": "f", "arguments": {"a": 1}}, {"function": "now", "parameters": {}}]', "", [("f", {"a": 1}), ("now", {})]),
    ('{"name": "Bob", "age": 7}', '{"name": "Bob", "age": 7}', []),
    ('{"answer": 42} and {"name": "f", "parameters": {}}', '{"answer": 42} and {"name": "f", "parameters": {}}', []),
    ("<|python_tag|>search.call(query=1)", "<|python_tag|>search.call(query=1)", []),
    ("[1, 2]", "[1, 2]", []),
    ('Sure: <|python_tag|>{"name": "f", "parameters": {"x": true}}', "Sure:", [("f", {"x": True})]),
]
MISTRAL = [
    ('[TOOL_CALLS][{"name": "f", "arguments": {"a": "]"}}, {"name": "now", "arguments": {}}]', "", [("f", {"a": "]"}), ("now", {})]),
    ('[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}, "id": "123456789"}]', "", [("f", {"a": 1})]),
    ('[TOOL_CALLS]f[ARGS]{"a": {"b": []}}[TOOL_CALLS]now[ARGS]{}', "", [("f", {"a": {"b": []}}), ("now", {})]),
    ('Well [TOOL_CALLS]ns.sub-name[CALL_ID]abcdefghi[ARGS]{"a": 1}', "Well", [("ns.sub-name", {"a": 1})]),
    ('[TOOL_CALLS]f{"a": 1}', "", [("f", {"a": 1})]),
    ("[TOOL_CALLS] sorry, no!", "[TOOL_CALLS] sorry, no!", []),
    ("[TOOL", "[TOOL", []),
]
PYTHONIC = [
    ('[get_weather(city="Paris", days=3)]', "", [("get_weather", {"city": "Paris", "days": 3})]),
    ("[f(a=[1, 2.5, -3e2, (True, None,)], b={'x': 'it\\'s', 1: \"q\\\"\"}), now()]", "",
     [("f", {"a": [1, 2.5, -300.0, [True, None]], "b": {"x": "it's", "1": 'q"'}}), ("now", {})]),
    ("<|python_start|>[f(s='é😀\\n\\x41\\u00e9\\U0001F600\\q')]<|python_end|>", "", [("f", {"s": "é😀\nAé😀\\q"})]),
    ("[ns.sub-name(x = 0x10,y=1_000,)]", "", [("ns.sub-name", {"x": 16, "y": 1000})]),
    ("[f(a={}, b=[], c='')] and more", " and more", [("f", {"a": {}, "b": [], "c": ""})]),
    ("[see(1) for more]", "[see(1) for more]", []),
    ("[f(1)]", "[f(1)]", []),
    ("[f", "[f", []),
    ("No [f(a=1)]", "No [f(a=1)]", []),
]  # fmt: skip
EXAMPLES = [
    (parser, *example)
    for parser, examples in (("hermes", HERMES), ("llama3_json", LLAMA3), ("mistral", MISTRAL), ("pythonic", PYTHONIC))
    for example in examples
]


@pytest.mark.parametrize(("parser", "text", "content", "calls"), EXAMPLES, ids=lambda value: str(value)[:40])
def test_every_cutting_gives_the_same_message(parser: str, text: str, content: str, calls: list[tuple[str, Any]]):
    whole = joined([text], parser)
    assert [(name, json.loads(arguments)) for name, arguments in whole.calls] == calls
    assert whole.content == content and whole.reasoning == ""
    assert joined(list(text) or [""], parser) == whole
    for first in range(len(text) + 1):
        assert joined([text[:first], text[first:]], parser) == whole
        for second in range(first, min(first + 24, len(text))):
            assert joined([text[:first], text[first:second], text[second:]], parser) == whole


@pytest.mark.parametrize(
    ("state", "text", "reasoning", "content"),
    [
        ("possible", "<think>\nI wonder. \n</think>\n\nYes.\n", "I wonder.", "Yes.\n"),
        ("possible", " \n<think>a</think>b", "a", "b"),
        ("possible", "No thought, but </think>", "", "No thought, but </think>"),
        ("possible", "<thin", "", "<thin"),
        ("possible", "  <", "", "  <"),
        ("begun", "I wonder\n\nwhether</thin </think> \nYes", "I wonder\n\nwhether</thin", "Yes"),
        ("begun", "<think>again</think>x", "again", "x"),
        ("begun", "never ended ", "never ended", ""),
        ("begun", "</think>\n\n", "", ""),
        ("", "<think>a</think>b", "", "<think>a</think>b"),
    ],
)
def test_reasoning(state: str, text: str, reasoning: str, content: str):
    whole = joined([text], None, state)
    assert (whole.reasoning, whole.content) == (reasoning, content)
    for first in range(len(text) + 1):
        for second in range(first, len(text) + 1):
            assert joined([text[:first], text[first:second], text[second:]], None, state) == whole


@pytest.mark.parametrize("cut", range(1, len("\n</tool_call>")))
def test_a_closing_marker_that_is_cut_off_is_no_content(cut: int):
    told = joined(['<tool_call>{"name": "now", "arguments": {}}', "\n</tool_call>"[:cut]], "hermes")
    assert (told.content.strip(), told.calls) == ("", [["now", "{}"]])


def test_a_call_after_reasoning_and_only_one_where_asked():
    text = '<think>hm <tool_call></think>\n<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>' * 2
    told = joined(list(text), "hermes", "possible")
    assert (told.reasoning, [name for name, _ in told.calls]) == ("hm <tool_call>", ["f", "f"])
    assert joined(list(text), "hermes", "possible", parallel=False).calls == [["f", '{"a": 1}']]


FRAGMENTS = [
    "<think>", "</think>", "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>", "<|python_start|>",
    '{"name": "f", ', '"arguments": ', '"parameters": {', '"function": {', '"f"', "{", "}", "[", "]", "(", ")", "f(", "now(", "a=", "=",
    ",", ":", '"', "'", "\\", "\\u00", "\\x4", "1", "-2e5", "True", "null", " ", "\n", "x", "é", "<", "[f(a=", "[now()", ";",
]  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.sampled_from(FRAGMENTS), max_size=25).map("".join),
    st.sampled_from(PARSERS),
    st.sampled_from(["", "possible", "begun"]),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_any_text_and_any_cutting(text: str, parser: str, reasoning: str, parallel: bool, rng: random.Random):
    whole = joined([text], parser, reasoning, parallel)
    assert joined([*text, ""], parser, reasoning, parallel) == whole
    cuts = sorted(rng.randrange(len(text) + 1) for _ in range(4))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert joined(pieces, parser, reasoning, parallel) == whole
    if not reasoning and not whole.calls:
        assert whole.content == text


@pytest.mark.parametrize("parser", PARSERS)
@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>",
        "[TOOL_CALLS]",
        '{"a":',
        "[f(a=[",
        "<|python_tag|>{",
        "[f(a=" + "9" * 10,
        "\n",
        '<tool_call>{"arguments": {"a": "x',
        "x" * 10 + "[TOOL_CALLS]" + "x" * 600,
    ],
)
def test_long_nonsense_takes_time_in_proportion(parser: str, text: str):
    long = text * (100_000 // len(text))
    assert joined([long[i : i + 7] for i in range(0, len(long), 7)], parser) == joined([long], parser)


TOOLS = [
    ("get_weather", {"type": "object",
                     "properties": {"city": {"type": "string", "maxLength": 6}, "days": {"$ref": "#/$defs/days"}, "x": {"type": "boolean"}},
                     "required": ["city"], "$defs": {"days": {"type": "integer"}}, "additionalProperties": False}),
    ("now", {"type": "object", "properties": {}, "additionalProperties": False}),
]  # fmt: skip


def walks(text: str, reasoning: str, count: int) -> list[str]:
    """Texts that a grammar in Lark allows, found by random walks through it; those that do not end are left out."""
    tokenizer, found = llguidance.LLTokenizer("byte"), []
    for seed in range(count):
        matcher, rng, written = (
            llguidance.LLMatcher(tokenizer, llguidance.LLMatcher.grammar_from_lark(text)),
            random.Random(seed),
            bytearray(),
        )
        assert not matcher.is_error(), matcher.get_error()
        if reasoning:
            opening = b"hm</think>" if reasoning == "begun" else b"<think>hm</think>"
            assert matcher.consume_tokens(list(opening))
            written += opening
        while len(written) < 1500 and not matcher.is_stopped():
            mask = matcher.compute_bitmask()
            allowed = [i for i in range(256) if mask[i // 8] >> (i % 8) & 1]
            plain = [i for i in allowed if 97 <= i < 123 or i in b'"}])>' or len(allowed) < 4]
            if matcher.is_accepting() and (not allowed or rng.random() < 0.5):
                break
            token = rng.choice(plain or allowed)
            assert matcher.consume_token(token)
            written.append(token)
        if matcher.is_accepting():
            found.append(written.decode())
    return found


def check_calls(told: Joined) -> None:
    for name, arguments in told.calls:
        values = json.loads(arguments)
        assert set(values) <= {"city", "days", "x"} if name == "get_weather" else (name, values) == ("now", {})
        assert name == "now" or "city" in values


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("reasoning", ["", "possible", "begun"])
@pytest.mark.parametrize("parser", PARSERS)
def test_what_the_grammar_allows_is_read_back(parser: str, reasoning: str, parallel: bool):
    """Each text is calls of the tools and nothing else, or one call."""
    texts = walks(tool_grammar(TOOL_CALL_PARSERS[parser], TOOLS, parallel, None, reasoning), reasoning, 30)
    for text in texts:
        told = joined(list(text), parser, reasoning, parallel=True)
        assert told.content == "" and 1 <= len(told.calls) <= (99 if parallel else 1)
        check_calls(told)
    assert len(texts) > 3


NAMED = {"type": "object", "properties": {"name": {"$ref": "#/$defs/days"}, "n": {"type": "integer"}}, "required": ["name"],
         "$defs": {"days": {"enum": ["now", "mon"]}}, "additionalProperties": False}  # fmt: skip
ANSWERS = [
    (Grammar.json_object(), ['{"a": [1]}', '{"name": "nows"}', '{ "names": 1}', '{"a": "<tool_call>"}', "{}"]),
    (Grammar.json_schema(NAMED), ['{"name": "mon"}', '{"name":"mon","n":5}']),
    (Grammar.json_schema({"type": "array", "items": {"type": "integer"}}), ["[]", "[ 1, 2]"]),
    (Grammar.regex("[a-c]+"), ["abc"]),
    (Grammar.choice(["yes", "[no]"]), ["yes", "[no]"]),
    (Grammar.ebnf('start: "f{" x "}"\nx: /[a-c]*/'), ["f{ab}", "f{}"]),
]  # fmt: skip
NO_PARAMETERS = {"type": "object", "properties": {}}
ONE_CALL = {
    "hermes": '<tool_call>\n{"name": "get_weather", "arguments": {"city": "x", "days": 2}}\n</tool_call>',
    "llama3_json": '{"name": "get_weather", "parameters": {"city": "x", "days": 2}}',
    "pythonic": '[get_weather(city="x", days=2)]',
    "mistral": '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "x", "days": 2}}]',
}


@pytest.mark.parametrize("reasoning", ["", "possible", "begun"])
@pytest.mark.parametrize("parser", PARSERS)
@pytest.mark.parametrize(("grammar", "answers"), ANSWERS, ids=lambda value: value.kind.value if isinstance(value, Grammar) else "")
def test_an_answer_is_what_its_grammar_says_or_calls(parser: str, reasoning: str, grammar: Grammar, answers: list[str]):
    either = answer_or_calls(grammar, TOOL_CALL_PARSERS[parser], TOOLS, True, None, reasoning)
    assert either is not None
    before = {"": "", "possible": "<think>hm</think>\n", "begun": "hm</think>"}[reasoning]
    tokenizer = llguidance.LLTokenizer("byte")
    for text, good in [(answer, True) for answer in (*answers, ONE_CALL[parser])] + [("nothing like it", False), ("Hm.", False)]:
        matcher, data = llguidance.LLMatcher(tokenizer, llguidance.LLMatcher.grammar_from_lark(either.text)), list((before + text).encode())
        assert not matcher.is_error(), matcher.get_error()
        assert (matcher.try_consume_tokens(data) == len(data) and matcher.is_accepting()) is good, text
        if good:
            told = joined(list(before + text), parser, reasoning, alone=True)
            assert told == joined([before + text], parser, reasoning, alone=True)
            called = [] if text in answers else [["get_weather", '{"city": "x", "days": 2}']]
            assert (told.content, told.calls) == ("" if called else text, called)
    texts = walks(either.text, reasoning, 12)
    for text in texts:
        told = joined(list(text), parser, reasoning, alone=True)
        check_calls(told)
        if grammar.kind.value.startswith("json") and not told.calls:
            json.loads(told.content)
        assert bool(told.calls) != bool(told.content)
    assert texts


@pytest.mark.parametrize("parser", [*PARSERS, ""])
def test_the_white_space_that_was_asked_for_stays_in_larger_grammars(parser: str):
    grammar = Grammar.json_schema(NAMED).spaced("")
    wrapped = answer_or_calls(grammar, TOOL_CALL_PARSERS[parser], TOOLS, True, None, "") if parser else constrained_answer(grammar, "begun")
    assert wrapped is not None
    tokenizer = llguidance.LLTokenizer("byte")
    for text, good in (('{"name":"mon","n":5}', True), ('{"name": "mon","n":5}', False)):
        matcher = llguidance.LLMatcher(tokenizer, llguidance.LLMatcher.grammar_from_lark(wrapped.text))
        data = list((text if parser else f"hm</think>{text}").encode())
        assert not matcher.is_error(), matcher.get_error()
        assert (matcher.try_consume_tokens(data) == len(data) and matcher.is_accepting()) is good, text


@pytest.mark.parametrize("parser", [parser for parser in PARSERS if parser != "pythonic"])
def test_references_to_names_as_people_write_them(parser: str):
    """No URI has a space or an umlaut in it; llguidance takes nothing else."""
    tool = {"properties": {"a": {"$ref": "#/$defs/Größe 1"}}, "required": ["a"], "$defs": {"Größe 1": {"enum": ["ü"]}}}
    call = {"name": "f", ("parameters" if parser == "llama3_json" else "arguments"): {"a": "ü"}}
    text = {"hermes": "<tool_call>\n{}\n</tool_call>", "mistral": "[TOOL_CALLS][{}]"}.get(parser, "{}")
    data = list(text.replace("{}", json.dumps(call, ensure_ascii=False)).encode())
    either = answer_or_calls(Grammar.json_schema({"const": 1}), TOOL_CALL_PARSERS[parser], [("f", tool)], True, None, "")
    assert either is not None
    for grammar in (tool_grammar(TOOL_CALL_PARSERS[parser], [("f", tool)], True, None, ""), either.text):
        matcher = llguidance.LLMatcher(llguidance.LLTokenizer("byte"), llguidance.LLMatcher.grammar_from_lark(grammar))
        assert not matcher.is_error(), matcher.get_error()
        assert matcher.try_consume_tokens(data) == len(data)


@pytest.mark.parametrize("parser", [parser for parser in PARSERS if parser != "pythonic"])
def test_a_function_without_parameters_is_called_without_arguments(parser: str):
    grammars = [tool_grammar(TOOL_CALL_PARSERS[parser], [("f", NO_PARAMETERS)], True, None, "")]
    if (
        either := answer_or_calls(Grammar.json_schema({"const": 1}), TOOL_CALL_PARSERS[parser], [("f", NO_PARAMETERS)], True, None, "")
    ) is not None:
        grammars.append(either.text)
    tokenizer = llguidance.LLTokenizer("byte")
    for grammar in grammars:
        for arguments, good in (("{}", True), ('{"a": 1}', False)):
            text = ONE_CALL[parser].replace("get_weather", "f").replace('{"city": "x", "days": 2}', arguments).encode()
            matcher = llguidance.LLMatcher(tokenizer, llguidance.LLMatcher.grammar_from_lark(grammar))
            assert (matcher.try_consume_tokens(list(text)) == len(text) and matcher.is_accepting()) is good


def test_what_cannot_stand_beside_calls_stands_alone():
    for grammar in (Grammar.ebnf('root ::= "a"'), Grammar.structural_tag([{"begin": "<f>", "schema": {}, "end": "</f>"}], ["<f"])):
        assert answer_or_calls(grammar, TOOL_CALL_PARSERS["hermes"], TOOLS, True, None, "") is None


@pytest.mark.parametrize("schema", [{"properties": [1]}, {"properties": 5}, {"required": 5}, {"required": True}])
def test_what_is_no_schema_is_refused(schema: dict[str, Any]):
    with pytest.raises(InvalidRequest, match="`f` are no JSON schema"):
        tool_grammar(TOOL_CALL_PARSERS["pythonic"], [("f", schema)], True, None, "")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ messages }}", "hermes"),
        ("{% if tools %}<tool_call>{% endif %}", "hermes"),
        ("{% if tools %}<tool_call><function={% endif %}", None),
        ("{% if tools %}[AVAILABLE_TOOLS]{% endif %}[TOOL_CALLS]", "mistral"),
        ("{% if tools %}<|python_tag|>{% endif %}", "llama3_json"),
        (
            '{{ tools }} Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}',
            "llama3_json",
        ),
        ("{{ tools }} [func_name1(params_name1=params_value1, ...)]", "pythonic"),
        ("{{ tools }} something else", None),
    ],
)
def test_formats_by_template(template: str, expected: str | None):
    assert choose_tool_format(template) is (TOOL_CALL_PARSERS[expected] if expected else None)


def test_reasoning_by_template_and_prompt():
    assert choose_reasoning_parser("{{ messages }}") is None
    assert choose_reasoning_parser("... split('</think>') ...") == "qwen3"
    assert choose_reasoning_parser("<\uff5cAssistant\uff5c> split('</think>')") == "deepseek_r1"
    assert reasoning_state(None, "<think>\n") == ""
    assert [reasoning_state("qwen3", end) for end in ("assistant\n", "<think>\n", "<think>\n\n</think>\n\n")] == [
        "possible",
        "begun",
        "possible",
    ]
    assert [reasoning_state("deepseek_r1", end) for end in ("assistant\n", "<think>\n", "</think>\n")] == ["begun", "begun", "possible"]


@pytest.mark.parametrize(
    ("grammar", "good", "bad"),
    [
        (Grammar.json_object(), '{"a": [1]}', "[1]"),
        (Grammar.json_schema({"type": "object", "properties": {"é": {"enum": ["a/b"]}}, "required": ["é"]}), '{"é": "a/b"}', "{}"),
        (Grammar.regex(r"a/b\/[^/]+"), "a/b/c", "a/b//"),
        (Grammar.choice(['say "yes"', "n\no"]), "n\no", "n"),
        (Grammar.ebnf('start: "a" b\nb: /[{}]/'), "a}", "b"),
    ],
)
def test_grammars_after_reasoning(grammar: Grammar, good: str, bad: str):
    tokenizer = llguidance.LLTokenizer("byte")
    for reasoning, before in (("begun", "hm, {\n</think>\n\n"), ("possible", "<think>hm</think>\n\n"), ("possible", "")):
        wrapped = constrained_answer(grammar, reasoning)
        assert wrapped is not None and constrained_answer(grammar, "") is grammar
        for answer, expected in ((good, True), (bad, False)):
            matcher = llguidance.LLMatcher(tokenizer, llguidance.LLMatcher.grammar_from_lark(wrapped.text))
            assert not matcher.is_error(), matcher.get_error()
            taken = matcher.try_consume_tokens(list((before + answer).encode())) == len((before + answer).encode())
            assert (taken and matcher.is_accepting()) is expected, (reasoning, answer)
    assert constrained_answer(Grammar.ebnf("root ::= 'a'"), "begun") is None
