"""Incremental detokenization: the pieces of any output join to its text, for every kind of tokenizer."""

import random
import time
from collections.abc import Sequence
from functools import cache

import pytest
import small_tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import SPECIAL, TEXTS, random_texts

from jaxserve.request import FinishReason, SamplingParams
from jaxserve.tokenizer import TextStream, Tokenizer
from jaxserve.tokenizer.detokenizer import WindowDetokenizer

KINDS = ["byte_level", "sentencepiece", "gemma_like", "word_pieces", "python"]


@cache
def tokenizer(kind: str) -> Tokenizer:
    if kind == "python":
        from transformers import ByT5Tokenizer

        return Tokenizer(ByT5Tokenizer())
    return Tokenizer(small_tokenizers.fast(getattr(small_tokenizers, kind)()))


def pushed(kind: str, token_ids: Sequence[int], prompt: Sequence[int] = (), skip_special_tokens: bool = True) -> str:
    detokenizer = tokenizer(kind).detokenizer(prompt, skip_special_tokens)
    pieces = [detokenizer.push(token_id) for token_id in token_ids]
    if kind in ("byte_level", "sentencepiece", "gemma_like"):
        assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in tokenizer(kind).decode(token_ids)
    return "".join(pieces) + detokenizer.flush()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skip_special_tokens", [True, False])
def test_pieces_join_to_the_decoded_text(kind: str, skip_special_tokens: bool):
    for text in [*TEXTS, *random_texts(60, seed=1)]:
        token_ids = tokenizer(kind).encode(text)
        assert pushed(kind, token_ids, skip_special_tokens=skip_special_tokens) == tokenizer(kind).decode(token_ids, skip_special_tokens)


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece", "gemma_like"])
def test_text_comes_back_as_it_was(kind: str):
    for text in [*TEXTS, *random_texts(60, seed=2)]:
        token_ids = tokenizer(kind).encode(text, add_special_tokens=False)
        # This kind of tokenizer marks a text's start with a space that it does not add where there is one.
        assert pushed(kind, token_ids) == (text.removeprefix(" ") if kind == "sentencepiece" else text)


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_any_byte_level_tokens_give_what_decoding_gives(data: st.DataObject):
    size = tokenizer("byte_level").vocab_size
    token_ids = data.draw(st.lists(st.integers(0, size + 3), max_size=30))
    skip = data.draw(st.booleans())
    assert pushed("byte_level", token_ids, skip_special_tokens=skip) == tokenizer("byte_level").decode(token_ids, skip)


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece", "gemma_like"])
def test_output_continues_the_prompt_wherever_it_is_cut(kind: str):
    """Also in the middle of a character: what the prompt began, the output completes."""
    for text in [*TEXTS, *random_texts(20, seed=3)]:
        token_ids = tokenizer(kind).encode(text, add_special_tokens=False)
        for cut in range(1, len(token_ids)):
            detokenizer = tokenizer(kind).detokenizer()
            shown = "".join([detokenizer.push(token_id) for token_id in token_ids[:cut]])
            assert shown + pushed(kind, token_ids[cut:], token_ids[:cut]) == pushed(kind, token_ids)


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_what_the_prompt_began_and_the_output_leaves_is_no_output(kind: str):
    """A prompt of token ids may end in the middle of a character; an answer that must be JSON begins with its brace."""
    whole, brace = (tokenizer(kind).encode(text, add_special_tokens=False) for text in ("\U0001f9ff", "{}"))
    assert len(whole) > 2
    for cut in range(1, len(whole)):
        assert pushed(kind, brace, whole[:cut]).lstrip(" ") == "{}"
        assert pushed(kind, [], whole[:cut]) == ""
    assert "\ufffd" in pushed(kind, [whole[-2], *brace], whole[:-2]), "the output's own byte is told"


def test_a_leading_space_is_kept_after_a_prompt_and_dropped_without_one():
    world = tokenizer("sentencepiece").encode("the world", add_special_tokens=False)
    prompt = tokenizer("sentencepiece").encode("hello")
    assert pushed("sentencepiece", world) == "the world"
    assert pushed("sentencepiece", world, prompt) == " the world"
    assert pushed("sentencepiece", world, prompt[:1]) == "the world", "BOS has no text"


def test_special_tokens():
    hello = tokenizer("byte_level").encode("hello<|im_end|>there")
    assert pushed("byte_level", hello) == "hellothere"
    assert pushed("byte_level", hello, skip_special_tokens=False) == "hello<|im_end|>there"
    assert tokenizer("byte_level").is_special(SPECIAL.index("<|im_end|>"))
    thinking = tokenizer("byte_level").encode("a<think>b")
    assert not any(tokenizer("byte_level").is_special(t) for t in thinking)
    assert pushed("byte_level", thinking) == "a<think>b"


def test_bytes_that_are_no_character():
    byte = {i: tokenizer("sentencepiece").encode("\t", add_special_tokens=False)[-1] - 9 + i for i in range(256)}
    a = next(token for token in range(1000) if tokenizer("sentencepiece").token_text(token) == "a")
    assert pushed("sentencepiece", [byte[0xF0], byte[0x9F], byte[0x98], byte[0x80], a]) == "😀a"
    assert pushed("sentencepiece", [byte[0xF0], byte[0x9F], a]).endswith("\ufffd\ufffda")
    assert pushed("sentencepiece", [byte[0xFF], byte[0xC3], byte[0xA9], byte[0xE2]]) == "\ufffdé\ufffd"
    detokenizer = tokenizer("byte_level").detokenizer()
    emoji = tokenizer("byte_level").encode("😀")
    assert len(emoji) > 1
    assert [detokenizer.push(t) for t in emoji] == [""] * (len(emoji) - 1) + ["😀"]


def test_a_window_that_never_ends_in_a_character_is_let_go():
    detokenizer = WindowDetokenizer(lambda token_ids: "\ufffd" * len(token_ids))
    pieces = [detokenizer.push(1) for _ in range(100)]
    assert "".join(pieces) + detokenizer.flush() == "\ufffd" * 100
    assert "" in pieces


@given(st.lists(st.integers(0, 400), max_size=25), st.lists(st.integers(1, 4), max_size=25))
@settings(max_examples=100, deadline=None)
def test_a_stream_gives_the_same_text_however_many_tokens_come_at_once(token_ids: list[int], sizes: list[int]):
    stream = TextStream(tokenizer("byte_level"), SamplingParams())
    text, rest = "", list(token_ids)
    for size in sizes:
        text += stream.push(rest[:size]).text
        del rest[:size]
    text += stream.push(rest, FinishReason.LENGTH).text
    assert text == tokenizer("byte_level").decode(token_ids)


def test_a_stream_hides_the_token_that_ends_it():
    the = tokenizer("byte_level").encode("the end")
    end = SPECIAL.index("</s>")
    for params, reason, tokens, expected in (
        (SamplingParams(), FinishReason.EOS, [*the, end], "the end"),
        (SamplingParams(skip_special_tokens=False), FinishReason.EOS, [*the, end], "the end"),
        (SamplingParams(skip_special_tokens=False), FinishReason.LENGTH, [*the, end], "the end</s>"),
        (SamplingParams(skip_special_tokens=False, include_stop_str_in_output=True), FinishReason.EOS, [*the, end], "the end</s>"),
        (SamplingParams(stop_token_ids=(the[-1],)), FinishReason.STOP, the, tokenizer("byte_level").decode(the[:-1])),
        (SamplingParams(stop_token_ids=(the[-1],), include_stop_str_in_output=True), FinishReason.STOP, the, "the end"),
    ):
        delta = TextStream(tokenizer("byte_level"), params).push(tokens, reason)
        assert (delta.text, delta.stop, delta.num_tokens) == (expected, None, len(tokens))


def test_a_stream_tells_each_tokens_text_whatever_stop_strings_hold_back():
    tokens = [*tokenizer("byte_level").encode("hello there, 😀 STO now"), SPECIAL.index("</s>")]
    stream = TextStream(tokenizer("byte_level"), SamplingParams(stop=("STOP",)), keep_pieces=True)
    deltas = [stream.push([token], FinishReason.EOS if token == tokens[-1] else None) for token in tokens]
    assert [len(delta.pieces) for delta in deltas] == [1] * len(tokens)
    assert "".join(delta.pieces[0] for delta in deltas) == "hello there, 😀 STO now</s>"
    assert "".join(delta.text for delta in deltas) == "hello there, 😀 STO now"


def test_a_stream_stops_within_the_tokens_of_a_push():
    tokens = tokenizer("byte_level").encode("hello there, how can I help you")
    for size in (1, 2, 3, len(tokens)):
        stream = TextStream(tokenizer("byte_level"), SamplingParams(stop=("re, h",)))
        text, count, stop = "", 0, None
        for start in range(0, len(tokens), size):
            delta = stream.push(tokens[start : start + size])
            text, count, stop = text + delta.text, count + delta.num_tokens, delta.stop
            if stop:
                break
        assert (text, stop) == ("hello the", "re, h")
        assert tokenizer("byte_level").decode(tokens[:count]).startswith("hello there, h")
        assert "re, h" not in tokenizer("byte_level").decode(tokens[: count - 1])


def test_stop_strings_wait_for_min_tokens():
    tokens = tokenizer("byte_level").encode("aXbXcXd")
    assert len(tokens) == 7
    delta = TextStream(tokenizer("byte_level"), SamplingParams(stop=("X",), min_tokens=3)).push(tokens, FinishReason.LENGTH)
    assert (delta.text, delta.stop, delta.num_tokens) == ("aXb", "X", 4)


def test_unfinished_text_comes_at_the_end():
    tokens = tokenizer("byte_level").encode("abc")
    stream = TextStream(tokenizer("byte_level"), SamplingParams(stop=("abcd",)))
    assert stream.push(tokens).text == ""
    assert stream.push([], FinishReason.LENGTH).text == "abc"


def test_a_token_costs_little():
    tokens = tokenizer("byte_level").encode(" ".join(TEXTS) * 30)
    random.Random(0).shuffle(tokens)
    stream = TextStream(tokenizer("byte_level"), SamplingParams(stop=("never", "\n\n\n\nso")))
    start = time.process_time()
    for token in tokens:
        stream.push([token])
    assert (time.process_time() - start) / len(tokens) < 20e-6, "measured: 1.4 us"
