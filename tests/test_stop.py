"""Stop strings across every way of cutting a text."""

import itertools
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.tokenizer import StopMatcher


def streamed(pieces: list[str], stop: list[str], include: bool = False) -> tuple[str, str | None]:
    """All text that is let through, and the stop string; nothing may come after it."""
    matcher = StopMatcher(stop, include)
    text = ""
    for piece in pieces:
        free, found = matcher.push(piece)
        text += free
        if found is not None:
            return text, found
    return text + matcher.flush(), None


def expected(text: str, stop: list[str], include: bool = False) -> tuple[str, str | None]:
    """By trying every end: the first at which some stop string ends, and of those the longest."""
    for end in range(1, len(text) + 1):
        found = [s for s in stop if text[:end].endswith(s)]
        if found:
            longest = max(found, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


@given(
    text=st.text("ab", max_size=25),
    stop=st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=4),
    cuts=st.lists(st.integers(0, 25), max_size=8),
    include=st.booleans(),
)
@settings(max_examples=400, deadline=None)
def test_cutting_changes_nothing(text: str, stop: list[str], cuts: list[int], include: bool):
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(edges)]
    assert streamed(pieces, stop, include) == expected(text, stop, include)


@pytest.mark.parametrize(
    ("text", "stop"),
    [
        ("aXYb", ["XY"]),
        ("xabcabdx", ["abcd", "abd"]),
        ("\n\nUser: hi", ["\n\nUser:"]),
        ("日本語😀end", ["語😀", "😀e"]),
        ("aaab", ["aab", "b"]),
    ],
)
def test_every_way_of_cutting(text: str, stop: list[str]):
    for size in range(len(text)):
        for cuts in itertools.combinations(range(1, len(text)), size):
            pieces = [text[a:b] for a, b in itertools.pairwise((0, *cuts, len(text)))]
            assert streamed(pieces, stop) == expected(text, stop)


def test_only_what_may_become_a_stop_string_is_held_back():
    matcher = StopMatcher(["stop", "opal"])
    assert matcher.push("go on, s") == ("go on, ", None)
    assert matcher.push("to") == ("", None)
    assert matcher.push("a") == ("stoa", None)
    assert matcher.push("sto") == ("", None)
    assert matcher.push("pa") == ("stop"[:0], "stop")


def test_special_characters_are_plain():
    assert streamed(["a", "]", "b", "^", "-", "\\"], ["^-"]) == ("a]b", "^-")
    assert streamed(["a.c abc"], ["b"]) == ("a.c a", "b")


@pytest.mark.parametrize("size", [1, 7, 1_000_000])
def test_a_megabyte_of_near_misses_takes_linear_time(size: int):
    matcher = StopMatcher(["a" * 1000 + "b", "c" + "a" * 900, "aab" * 100 + "c", *(f"a{i}" for i in range(50))])
    text = "a" * 1_000_000
    start = time.process_time()
    length = sum(len(matcher.push(text[i : i + size])[0]) for i in range(0, len(text), size))
    elapsed = time.process_time() - start
    assert length + len(matcher.flush()) == len(text)
    assert elapsed < 4, "measured: 0.2 s in one push, 0.6 s by single characters"
