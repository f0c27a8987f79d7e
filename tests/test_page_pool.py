"""PagePool: every page is free, held or cached, and goes from one to the other as told."""

import random
from collections import Counter

import pytest

from jaxserve.page_changes import PageChanges
from jaxserve.scheduler.page_pool import PagePool


def key(i: int) -> bytes:
    return i.to_bytes(32, "big")


def test_each_page_is_handed_out_once():
    pool = PagePool(4)
    assert sorted(pool.allocate() for _ in range(4)) == [0, 1, 2, 3]
    assert (pool.num_available, pool.num_held) == (0, 4)
    with pytest.raises(KeyError):
        pool.allocate()


def test_a_page_is_free_with_its_last_reference():
    pool = PagePool(1)
    page = pool.allocate()
    pool.share(page)
    pool.release(page)
    assert pool.num_available == 0
    pool.release(page)
    assert pool.num_available == 1
    with pytest.raises(AssertionError, match="more often than held"):
        pool.release(page)


def test_a_stored_page_is_found_after_its_release_and_revived_by_sharing():
    pool = PagePool(2)
    page = pool.allocate()
    pool.store(page, key(1))
    pool.release(page)
    assert pool.num_held == 0 and not pool.is_held(page)
    assert pool.has(key(1)) and pool.find(key(1)) == page
    pool.share(page)
    assert pool.is_held(page) and pool.num_available == 1
    pool.check_integrity({page: 1})


def test_free_pages_go_before_cached_ones_and_the_least_recently_used_goes_first():
    pool = PagePool(3)
    pages = [pool.allocate() for _ in range(3)]
    for i in (0, 1):
        pool.store(pages[i], key(i))
    for page in pages:
        pool.release(page)
    pool.share(pages[0])  # used again: now page 1 is the oldest
    pool.release(pages[0])
    assert pool.allocate() == pages[2]
    assert pool.allocate() == pages[1]
    assert not pool.has(key(1)) and pool.has(key(0))
    assert pool.allocate() == pages[0]
    assert not pool.has(key(0))


def test_equal_content_computed_twice_is_stored_once():
    pool = PagePool(2)
    first, second = pool.allocate(), pool.allocate()
    pool.store(first, key(1))
    pool.store(second, key(1))
    assert pool.find(key(1)) == first
    pool.release(second)
    pool.check_integrity({first: 1})
    assert pool.allocate() == second  # it was free, not cached
    assert pool.find(key(1)) == first


def test_changes_tell_what_became_findable_and_what_is_gone():
    pool = PagePool(1)
    page = pool.allocate()
    pool.store(page, key(1))
    assert pool.stored().stored == {key(1)}
    pool.changes = PageChanges()
    pool.store(page, key(1))
    pool.release(page)
    pool.store(pool.allocate(), key(2))
    assert (pool.changes.stored, pool.changes.removed, pool.stored().stored) == ({key(2)}, {key(1)}, {key(2)})


def test_check_integrity_names_what_is_wrong():
    pool = PagePool(3, group=1)
    page = pool.allocate()
    with pytest.raises(AssertionError, match=f"KV group 1: page {page} has 1 references and stands in 0 page tables"):
        pool.check_integrity({})
    with pytest.raises(AssertionError, match=f"page {page} has 1 references and stands in 2"):
        pool.check_integrity({page: 2})
    pool._free.pop()
    with pytest.raises(AssertionError, match="are not 3"):
        pool.check_integrity({page: 1})


def test_any_sequence_of_operations_keeps_the_count():
    draws = random.Random(0)
    pool = PagePool(8)
    held: Counter[int] = Counter()
    for step in range(5_000):
        action = draws.choice(["allocate", "share", "release", "release", "store", "revive"])
        if action == "allocate" and pool.num_available:
            held[pool.allocate()] += 1
        elif action == "revive":
            wanted = key(draws.randrange(12))
            if pool.has(wanted):
                pool.share(pool.find(wanted))
                held[pool.find(wanted)] += 1
        elif held and action in ("share", "release", "store"):
            page = draws.choice(list(held))
            if action == "share":
                pool.share(page)
                held[page] += 1
            elif action == "store":
                pool.store(page, key(draws.randrange(12)))
            else:
                pool.release(page)
                held[page] -= 1
                held += Counter()  # drops what is zero
        assert pool.num_held == len(held)
        if step % 50 == 0:
            pool.check_integrity(held)
