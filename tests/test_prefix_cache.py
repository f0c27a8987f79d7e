"""PrefixCache: keys name all that K/V depends on, and a prefix is as long as every KV group can serve it."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.page_key import ROOT, page_key, request_extras
from jaxserve.prefix_match import first_page_seen
from jaxserve.request import Request, SamplingParams
from jaxserve.scheduler.page_pool import PagePool
from jaxserve.scheduler.prefix_cache import PrefixCache

PAGE_SIZE = 4


def request(tokens: Sequence[int], salt: str = "", adapter: str = "") -> Request:
    return Request("r", tuple(tokens), SamplingParams(), salt, adapter)


def keys_of(tokens: Sequence[int], salt: str = "", adapter: str = "") -> list[bytes]:
    keys: list[bytes] = []
    PrefixCache([], [], PAGE_SIZE).extend_keys(keys, request(tokens, salt, adapter), tokens, len(tokens) // PAGE_SIZE)
    return keys


def cache_with(stored: Sequence[set[int]], windows: Sequence[int | None], keys: Sequence[bytes]) -> tuple[PrefixCache, list[PagePool]]:
    """A cache in which group g holds the pages of the logical indices stored[g]."""
    pools = [PagePool(32, i) for i in range(len(windows))]
    for pool, indices in zip(pools, stored, strict=True):
        for i in sorted(indices):
            pool.store(pool.allocate(), keys[i])
    return PrefixCache(pools, windows, PAGE_SIZE), pools


def test_a_key_depends_on_every_token_before_its_end():
    tokens = list(range(16))
    keys = keys_of(tokens)
    assert len(set(keys)) == 4 and all(len(key) == 32 for key in keys)
    for position in range(16):
        changed = [*tokens]
        changed[position] = 99
        page = position // PAGE_SIZE
        assert keys_of(changed)[:page] == keys[:page]
        assert not set(keys_of(changed)[page:]) & set(keys)


def test_a_key_depends_on_adapter_and_salt_and_on_which_is_which():
    variants = [("", ""), ("a", ""), ("", "a"), ("ab", "c"), ("a", "bc"), ("1:a", ""), ("", "1:a"), ("\ud800", "")]
    first = {keys_of(range(4), salt, adapter)[0] for salt, adapter in variants}
    assert len(first) == len(variants)


def test_a_key_is_the_hash_of_parent_tokens_and_extras():
    tokens = b"".join(i.to_bytes(4, "little") for i in range(4))
    assert keys_of(range(8))[0] == page_key(ROOT, tokens, request_extras(request(range(4))))


def test_keys_grow_page_by_page_as_they_do_at_once():
    tokens = list(range(40))
    keys: list[bytes] = []
    cache = PrefixCache([], [], PAGE_SIZE)
    for num_pages in (0, 1, 1, 4, 3, 10):
        cache.extend_keys(keys, request(tokens), tokens, num_pages)
    assert keys == keys_of(tokens)


@pytest.mark.parametrize(("stored", "length"), [({0, 1, 2, 3}, 4), ({0, 1, 3}, 2), ({1, 2, 3}, 0), (set(), 0)])
def test_a_full_group_serves_up_to_the_first_gap(stored: set[int], length: int):
    keys = keys_of(range(16))
    cache, pools = cache_with([stored], [None], keys)
    prefix = cache.match(keys)
    assert prefix.num_tokens == length * PAGE_SIZE
    assert list(prefix.pages[0]) == [pools[0].find(key) for key in keys[:length]]


@pytest.mark.parametrize(
    ("window", "stored", "length", "first"),
    [
        (5, {3}, 4, 3),  # the next token, 16, sees 12 ... 16
        (6, {3}, 0, 0),  # it sees 11, in page 2, too; and so for every shorter prefix
        (6, {2, 3}, 4, 2),
        (6, {1, 2}, 3, 1),  # page 3 is gone: a shorter prefix, whose window is there
        (100, {1, 2, 3}, 0, 0),  # a window longer than the prompt needs all of it
        (100, {0, 1}, 2, 0),
    ],
)
def test_a_windowed_group_needs_only_its_last_window(window: int, stored: set[int], length: int, first: int):
    keys = keys_of(range(16))
    cache, pools = cache_with([stored], [window], keys)
    prefix = cache.match(keys)
    assert prefix.num_tokens == length * PAGE_SIZE
    assert list(prefix.pages[0]) == [pools[0].find(key) for key in keys[first:length]]


def test_a_prefix_is_what_all_groups_can_serve():
    keys = keys_of(range(24))
    # The full group ends at 5; the window of 5 is there for 3 and 6 only.
    cache, _ = cache_with([{0, 1, 2, 3, 4}, {2, 5}], [None, 5], keys)
    assert cache.match(keys).num_tokens == 3 * PAGE_SIZE


def test_a_group_is_asked_again_about_what_the_others_leave():
    keys = keys_of(range(24))
    # With windows of 5 the first serves 2 and 4 pages, the second 1, 2 and 3.
    cache, _ = cache_with([{1, 3}, {0, 1, 2}], [5, 5], keys)
    assert cache.match(keys).num_tokens == 2 * PAGE_SIZE


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_no_longer_prefix_could_be_served(data: st.DataObject):
    keys = keys_of(range(32))
    windows = data.draw(st.lists(st.one_of(st.none(), st.integers(2, 20)), min_size=1, max_size=3))
    stored = [data.draw(st.sets(st.integers(0, 7))) for _ in windows]
    cache, _ = cache_with(stored, windows, keys)

    def servable(length: int) -> bool:
        seen = [{p // PAGE_SIZE for p in range(length * PAGE_SIZE) if w is None or p > length * PAGE_SIZE - w} for w in windows]
        return all(needed <= there for needed, there in zip(seen, stored, strict=True))

    limit = data.draw(st.integers(0, 8))
    assert cache.match(keys[:limit]).num_tokens == PAGE_SIZE * max(length for length in range(limit + 1) if servable(length))


def test_first_page_seen():
    assert first_page_seen(100, None, 4) == 0
    assert first_page_seen(16, 5, 4) == 3
    assert first_page_seen(16, 6, 4) == 2
    assert first_page_seen(3, 9, 4) == 0
