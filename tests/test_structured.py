"""Grammars to matchers to masks, without a model: what is allowed, what is refused, and that no grammar hurts the process."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from small_tokenizers import byte_level, fast, gemma_like, sentencepiece, word_pieces
from tiny_models import write_tokenizer

from jaxserve.errors import InvalidRequest, StartupError
from jaxserve.grammar import Grammar
from jaxserve.structured import GrammarCompiler, MaskFiller, Matcher, examiner, read_tokens
from jaxserve.structured import compiler as compiler_module
from jaxserve.structured import masks as masks_module
from jaxserve.tokenizer import Tokenizer, load_pipeline, load_tokenizer

TOKENIZER = Tokenizer(fast(byte_level()))
VOCAB_SIZE = TOKENIZER.vocab_size + 45  # models pad their vocabulary
EOS, END_OF_TURN = 2, 4


@pytest.fixture(scope="module")
def compiler() -> Any:
    examiner.CPU_SECONDS, before = 1.0, examiner.CPU_SECONDS
    made = GrammarCompiler(read_tokens(TOKENIZER.pipeline, VOCAB_SIZE, [EOS, END_OF_TURN]))
    yield made
    made.close()
    examiner.CPU_SECONDS = before


@pytest.fixture(scope="module")
def filler() -> MaskFiller:
    return MaskFiller(2)


def allowed(filler: MaskFiller, matcher: Matcher) -> set[int]:
    """Token ids that may come next."""
    mask = filler.fill([matcher], VOCAB_SIZE)[0]
    return {token for token in range(VOCAB_SIZE) if mask[token // 32] >> (token % 32) & 1}


def accepts(matcher: Matcher, text: str, filler: MaskFiller) -> bool:
    """Whether a text is in the grammar: each token allowed, and then the end."""
    matcher = matcher.copy()
    for token in TOKENIZER.encode(text, add_special_tokens=False):
        if token not in allowed(filler, matcher):
            return False
        matcher.consume([token])
    return {EOS, END_OF_TURN} <= allowed(filler, matcher)


def refusal(compiler: GrammarCompiler, grammar: Grammar) -> str:
    error = compiler.compile(grammar).future.exception(60)
    assert isinstance(error, InvalidRequest)
    return str(error)


def test_a_mask_allows_what_can_be_completed_and_the_end_where_it_is_complete(compiler: GrammarCompiler, filler: MaskFiller):
    pattern = re.compile("[0-9]{2}(foo|bér)?")
    matcher = compiler.compile(Grammar.regex(pattern.pattern)).future.result(60).copy()
    digits = {t for t in range(TOKENIZER.vocab_size) if re.fullmatch(rb"[0-9]{1,2}", TOKENIZER.token_bytes(t))}
    assert allowed(filler, matcher) == digits
    matcher.consume(TOKENIZER.encode("42", add_special_tokens=False))
    starts = (b"foo", "bér".encode())
    known = {t: TOKENIZER.token_bytes(t) for t in range(TOKENIZER.vocab_size) if not TOKENIZER.is_special(t)}
    begun = {t for t, data in known.items() if data and any(s.startswith(data) for s in starts)}
    assert allowed(filler, matcher) == begun | {EOS, END_OF_TURN}
    matcher.consume(TOKENIZER.encode("bér", add_special_tokens=False))
    assert allowed(filler, matcher) == {EOS, END_OF_TURN} and not matcher.error


CHOICES = ["é", "😀x", 'q"uo\\te', "a\nb", "\x00\x7f", "/x/", "a|b", " lead", "日本", "(", "$^", "<|im_end|"]
SCHEMA = {"type": "object", "properties": {"a": {"$ref": "#/$defs/ß 1"}}, "required": ["a"], "$defs": {"ß 1": {"enum": ["ü", 1]}}}


@pytest.mark.parametrize(
    ("grammar", "inside", "outside"),
    [
        (Grammar.choice(CHOICES), CHOICES, ["e", "a", "a|", "x", ""]),
        (Grammar.json_object(), ['{"a":[1,{"b":null}]}', "{}", '{\n  "a": "x"\n}'], ["[]", "1", "{", '{"a" :   1}']),
        (Grammar.json_schema(SCHEMA), ['{"a":"ü"}', '{"a": 1}'], ["{}", '{"a":2}']),
        (Grammar.json_schema({"properties": {"a": {}}}), ['{"a": 1}', "{}"], ["1", "null", '{"a": 1, "b": 2}']),
        (Grammar.json_schema(True), ["1", "[]", '"x"'], ["x"]),
        (Grammar.json_schema({"properties": {"a": {}, "b": {}}}).spaced(""), ['{"a":1,"b":[1,2]}'], ['{"a": 1}', '{"b":[1, 2]}']),
        (Grammar.json_object().spaced("[ ]?"), ['{"a": 1,"b":2}'], ['{"a":  1}', '{"a":\n1}', "1"]),
        (Grammar.json_schema(True).spaced(r"\t"), ["[1,\t2]", "1"], ["[1, 2]"]),
        (Grammar.json_schema(True).spaced(r"(?:[\s]| ){0,2}"), ["[1,\n 2]"], ["[1,   2]", "[1,\xa02]", "[1,\x0b2]"]),
        (Grammar.regex(r"^\d{3}-[a-c]+$"), ["123-abc"], ["12-a", "123-", "123-d"]),
        (Grammar.ebnf('root ::= "a" [0-9]+ ("x" | "y")'), ["a12x", "a1y"], ["ax", "a1"]),
        (Grammar.ebnf('start: "f(" %json {"type": "integer"} ")"'), ["f(12)"], ["f()", 'f("1")']),
        (
            Grammar.structural_tag([{"begin": "<f>", "schema": {"type": "integer"}, "end": "</f>"}], ["<f"]),
            ["hello", "a <f>1</f> b", "<f>2</f><f>3</f>"],
            ["<f>x</f>", "<f>1"],
        ),
    ],
    ids=lambda value: value.kind.value if isinstance(value, Grammar) else "",
)
def test_every_kind_means_what_it_says(
    compiler: GrammarCompiler, filler: MaskFiller, grammar: Grammar, inside: Sequence[str], outside: Sequence[str]
):
    matcher = compiler.compile(grammar).future.result(60)
    assert [accepts(matcher, text, filler) for text in inside] == [True] * len(inside)
    assert [accepts(matcher, text, filler) for text in outside] == [False] * len(outside)


@pytest.mark.parametrize("backend", [byte_level(), sentencepiece(), gemma_like()], ids=["byte-level", "sentencepiece", "gemma"])
def test_tokens_are_the_bytes_that_the_detokenizer_shows(backend: Any):
    tokenizer = Tokenizer(fast(backend))
    tokens = read_tokens(tokenizer.pipeline, tokenizer.vocab_size, [EOS])
    ids = [t for t in range(tokenizer.vocab_size) if tokenizer.token_bytes(t) != b"\xff"]  # in no UTF-8
    assert [tokens.decode_bytes([t]) for t in ids] == [tokenizer.token_bytes(t) for t in ids]


def test_ends_that_the_tokenizer_lacks_are_left_out():
    pipeline = byte_level()
    size = pipeline.get_vocab_size()
    assert list(read_tokens(pipeline, size + 9, [EOS, size + 3]).eos_tokens) == [EOS]
    (stand_in,) = read_tokens(pipeline, size + 9, []).eos_tokens
    assert TOKENIZER.is_special(stand_in)
    assert read_tokens(pipeline, 100, [EOS]).vocab_size == size


def test_a_tokenizer_without_bytes_is_refused():
    with pytest.raises(StartupError, match="tokens of bytes"):
        read_tokens(word_pieces(), 300, [EOS])


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        (Grammar.regex("(a"), "unclosed group"),
        (Grammar.regex("(?=a)b"), "look-around"),
        (Grammar.json_schema({"type": "strin"}), "Invalid type"),
        (Grammar.json_schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (Grammar.json_schema({"type": "integer", "minimum": 5, "maximum": 3}), "minimum"),
        (Grammar.json_schema({"$ref": "http://example.com/schema"}), "registry"),
        (Grammar.json_schema({"$ref": "#"}), "leads back to itself"),
        (Grammar.ebnf("start: nothing"), "unknown name"),
        (Grammar.ebnf('root ::= "a'), "end of input"),
        (Grammar.json_schema(False), "`false`"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_refusal_says_why_in_one_line(compiler: GrammarCompiler, grammar: Grammar, reason: str):
    message = refusal(compiler, grammar)
    assert reason in message and "\n" not in message and len(message) < 320


def chain(link: str, count: int = 3000) -> str:
    return "start: a0\n" + "".join(f"a{i}: {link.format(f'a{i + 1}')}\n" for i in range(count)) + f'a{count}: "x"'


BOMBS = {
    "doubling terminals": Grammar.ebnf(chain("{0} {0}").replace("a", "A").replace("stArt", "start")),
    "many patterns": Grammar.json_schema({"allOf": [{"type": "string", "pattern": f".*{i}.*"} for i in range(3000)]}),
    "deep rules": Grammar.ebnf(chain("{0} {0} | {0}")),
    "deep references": Grammar.json_schema(
        {"$defs": {f"a{i}": {"$ref": f"#/$defs/a{(i + 1)}"} for i in range(3000)} | {"a3000": {}}, "$ref": "#/$defs/a0"}
    ),
    "deep groups": Grammar.regex("(" * 5000 + "a" + ")" * 5000),
    "products of alternatives": Grammar.json_schema(
        {"allOf": [{"anyOf": [{"properties": {f"a{i}_{j}": {"type": "string"}}} for j in range(10)]} for i in range(8)]}
    ),
    "GBNF in brackets": Grammar.ebnf("root ::= " + "(" * 20000 + '"a"' + ")" * 20000),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_and_the_next_grammar_is_not(compiler: GrammarCompiler, name: str):
    assert refusal(compiler, BOMBS[name])
    assert compiler.compile(Grammar.regex(f"after {name}")).future.result(60)


HARMLESS = {
    "nested repetition": (Grammar.regex("(a{1,1000}){1,1000}"), "a" * 50),
    "thousands of values": (Grammar.json_schema({"enum": [f"value {i}" for i in range(5000)]}), '"value 4999"'),
    "long": (Grammar.json_schema({"type": "array", "minItems": 10**9}), "[1,2,3"),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_looks_like_a_bomb_and_is_none_is_followed(compiler: GrammarCompiler, name: str):
    grammar, text = HARMLESS[name]
    matcher = compiler.compile(grammar).future.result(60).copy()
    matcher.consume(TOKENIZER.encode(text, add_special_tokens=False))
    assert not matcher.error


def test_a_matcher_that_explodes_later_tells_it(compiler: GrammarCompiler, filler: MaskFiller):
    """The work of a step is bounded."""
    matcher = compiler.compile(Grammar.regex("(a{1,1000}){1,1000}")).future.result(60).copy()
    matcher.consume(TOKENIZER.encode("a" * 5000, add_special_tokens=False))
    assert "lexer error" in matcher.error
    assert allowed(filler, matcher) == {EOS, END_OF_TURN}  # what fill() says of a matcher with an error


def test_a_grammar_is_compiled_once_and_forgotten_when_there_are_many(monkeypatch: pytest.MonkeyPatch):
    compiler = GrammarCompiler(read_tokens(TOKENIZER.pipeline, VOCAB_SIZE, [EOS]))
    first = compiler.compile(Grammar.regex("a", "one"))
    assert compiler.compile(Grammar.regex("a", "other")) is first
    monkeypatch.setattr(compiler_module, "MAX_CACHED", 2)
    compiler.compile(Grammar.regex("b"))
    compiler.compile(Grammar.regex("a"))  # used again: "b" is the oldest now
    compiler.compile(Grammar.regex("c"))
    assert compiler.compile(Grammar.regex("a")) is first
    monkeypatch.setattr(compiler_module, "MAX_CACHED_BYTES", 10)
    compiler.compile(Grammar.regex("dddddddddd"))
    assert compiler.compile(Grammar.regex("a")) is not first
    compiler.close()


SLOW = {"properties": {f"v{j}": {"type": "integer"} for j in range(3000)}}


def test_what_is_cancelled_is_not_compiled():
    compiler = GrammarCompiler(read_tokens(TOKENIZER.pipeline, VOCAB_SIZE, [EOS]))
    running = [compiler.compile(Grammar.json_schema({"title": str(i), **SLOW})) for i in range(2)]
    unwanted = Grammar.regex("unwanted")
    compilation = compiler.compile(unwanted)
    compiler.cancel(compilation)
    assert compilation.future.cancelled()
    again = compiler.compile(unwanted)
    compiler.cancel(compilation)  # what was compiled before is not what is wanted now
    assert again.future.result(60) is compiler.compile(unwanted).future.result(60)
    compiler.cancel(again)
    assert compiler.compile(unwanted) is again and all(each.future.result(60) for each in running)
    compiler.close()


def test_nobody_waits_behind_the_bombs_of_others(monkeypatch: pytest.MonkeyPatch):
    """What takes long goes to the end of another queue, where it waits without its time being counted, and can still be cancelled."""
    monkeypatch.setattr(examiner, "FIRST_CPU_SECONDS", 0.2)
    monkeypatch.setattr(examiner, "CPU_SECONDS", 1.0)
    compiler = GrammarCompiler(read_tokens(TOKENIZER.pipeline, VOCAB_SIZE, [EOS]))
    text = BOMBS["doubling terminals"].text
    bombs = [compiler.compile(Grammar.ebnf(f"{text}\n// {i}")) for i in range(8)]  # so many that the last has not begun
    assert compiler.compile(Grammar.regex("innocent")).future.result(60)
    assert not bombs[-1].future.done()
    assert isinstance(bombs[0].future.exception(60), InvalidRequest)
    assert bombs[-1].own_seconds() < bombs[0].own_seconds()
    compiler.cancel(bombs[-1])
    assert bombs[-1].future.cancelled() and compiler.compile(bombs[-1].grammar) is not bombs[-1]
    compiler.close()


def test_a_special_token_of_the_model_can_be_a_trigger(compiler: GrammarCompiler, filler: MaskFiller):
    structure = {"begin": "<think>", "schema": {"type": "object"}, "end": "."}
    matcher = compiler.compile(Grammar.structural_tag([structure], ["<think>"])).future.result(60).copy()
    (think,) = TOKENIZER.encode("<think>", add_special_tokens=False)
    assert think in allowed(filler, matcher)
    matcher.consume([think])
    assert {TOKENIZER.token_bytes(t) for t in allowed(filler, matcher)} == {b"{"}


def test_a_folders_pipeline_is_the_tokenizers(tmp_path: Path):
    """Loaded without transformers where the files suffice, with it where a token is in its settings alone."""
    write_tokenizer(tmp_path)
    plain = load_pipeline(tmp_path)
    assert plain is not None and plain.get_vocab() == (load_tokenizer(tmp_path).pipeline or plain).get_vocab()
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    added = {"content": "<|new|>", "special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
    settings["added_tokens_decoder"] = {str(plain.get_vocab_size()): added}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    more = load_pipeline(tmp_path)
    assert more is not None and more.token_to_id("<|new|>") == plain.get_vocab_size()
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(StartupError, match="cannot load the tokenizer"):
        load_pipeline(tmp_path)


def test_a_grammar_whose_masks_take_too_long_is_refused(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch):
    """Each step would wait for them, with all requests in it. No time is as short as none."""
    assert compiler.compile(Grammar.regex("[a-d]{3}")).future.result(60)
    monkeypatch.setattr(masks_module, "MASK_SECONDS", -1.0)
    assert refusal(compiler, Grammar.regex("[a-d]{4}")) == examiner.TOO_MUCH


@pytest.mark.parametrize("pattern", ["a", "5", ".", "[^ ]", "[ -~]", r"\S", r"\x20", r"\d", "(?i: )", " {2,99999}", "\xa0", "^ $", "\x00"])
def test_white_space_is_white_space(pattern: str):
    """Anything else between its parts, and an answer is no JSON."""
    with pytest.raises(InvalidRequest, match="white space alone") as caught:
        Grammar.json_object().spaced(pattern, "guided_whitespace_pattern")
    assert caught.value.param == "guided_whitespace_pattern"
