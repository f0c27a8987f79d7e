"""Changes of pages on their way: whoever hears of them late, in parts or merged ends up with what is stored, and nothing piles up."""

import random

import pytest

from jaxserve.page_changes import PageChanges
from jaxserve.page_key import short_names
from jaxserve.rpc import untold_pages
from jaxserve.rpc.prefix_index import PrefixIndex
from jaxserve.rpc.untold_pages import UntoldPages
from jaxserve.scheduler.page_pool import PagePool
from jaxserve.scheduler.page_watchers import PageWatchers

NUM_PAGES = 20


def key(number: int) -> bytes:
    return number.to_bytes(8, "little") + bytes(24)


class Reader:
    """A stream's end at the engine, and the http process that reads it when it likes."""

    def __init__(self, windows: tuple[int, ...] = (0,)) -> None:
        self.untold = UntoldPages()
        self.index = PrefixIndex(16, windows)
        self.put_pages = self.untold.put

    def read(self) -> None:
        for message in self.untold.take():
            self.index.change(message.group, message.stored, message.removed)


def store(pool: PagePool, number: int) -> None:
    """Let the content be cached, as of a sample that ended."""
    if not pool.has(key(number)):
        page = pool.allocate()
        pool.store(page, key(number))
        pool.release(page)


def held(pool: PagePool) -> set[int]:
    return {number for number in range(100) if pool.has(key(number))}


def test_whoever_reads_late_or_in_parts_knows_what_is_stored(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(untold_pages, "MAX_CHANGES", 7)
    draws = random.Random(0)
    pools = [PagePool(NUM_PAGES, group) for group in range(2)]
    watchers, readers = PageWatchers(pools), []
    for step in range(2000):
        for pool in pools:
            for _ in range(draws.randrange(4)):
                store(pool, draws.randrange(100))
        if step % 400 == 0:  # also while there is something to be told to others
            readers.append(Reader((0, 32)))
            watchers.add(readers[-1])
        watchers.tell()
        for number, reader in enumerate(readers):
            if draws.random() < 0.5 / (number * number + 1):  # from one that nearly keeps up to one that hardly ever reads
                reader.read()
            for mine in reader.index._held:
                assert len(mine) <= 2 * NUM_PAGES
            for changes in [*reader.untold._new, *reader.untold._untold]:
                assert len(changes) <= 2 * NUM_PAGES
    for reader in readers:
        reader.read()
        while reader.untold.more:
            reader.read()
        assert reader.index._held == [held(pool) for pool in pools]


def test_nothing_is_noted_while_nobody_watches():
    pool = PagePool(4)
    watchers, reader = PageWatchers([pool]), Reader()
    store(pool, 1)
    watchers.tell()
    assert pool.changes is None
    watchers.add(reader)
    watchers.add(reader)
    watchers.tell()
    store(pool, 2)
    watchers.tell()
    reader.read()
    assert reader.index._held == [{1, 2}]
    watchers.remove(reader)
    watchers.tell()
    assert pool.changes is None
    store(pool, 3)
    reader.read()
    assert reader.index._held == [{1, 2}]


def test_what_comes_and_goes_between_is_not_told():
    changes = PageChanges([key(1)])
    changes.remove(key(1))
    changes.remove(key(2))
    changes.store(key(2))
    assert len(changes) == 0
    later = PageChanges([key(3)])
    later.remove(key(4))
    changes.extend(later)
    undone = PageChanges([key(4)])
    undone.remove(key(3))
    changes.extend(undone)
    assert len(changes) == 0


def test_names_are_the_beginnings_of_keys():
    assert short_names([bytes([1, 2, 0, 0, 0, 0, 0, 3, *range(24)]), key(5)]) == [1 + 2 * 256 + 3 * 256**7, 5]
