"""PageChanges: which pages' contents became findable, and which are gone."""

from collections.abc import Iterable


class PageChanges:
    """What has changed in one KV group since somebody was told of it: keys of pages (page_key).

    It is the difference and no journal: what came and went in between is not in it. So it never holds more than the pages that there are
    now and those that were there then, however long nobody is told.

    Args:
        stored: what is there, for somebody who was told nothing.

    Attributes:
        stored: became findable.
        removed: are gone.
    """

    __slots__ = ("removed", "stored")

    def __init__(self, stored: Iterable[bytes] = ()):
        self.stored = set(stored)
        self.removed: set[bytes] = set()

    def __len__(self) -> int:
        return len(self.stored) + len(self.removed)

    def store(self, key: bytes) -> None:
        """A page became findable that was not."""
        if key in self.removed:
            self.removed.discard(key)
        else:
            self.stored.add(key)

    def remove(self, key: bytes) -> None:
        """A page that was findable is gone."""
        if key in self.stored:
            self.stored.discard(key)
        else:
            self.removed.add(key)

    def extend(self, later: "PageChanges") -> None:
        """Take in what changed after these."""
        returned, undone = self.removed & later.stored, self.stored & later.removed
        self.removed |= later.removed
        self.removed -= returned
        self.removed -= undone
        self.stored |= later.stored
        self.stored -= undone
        self.stored -= returned

    def take(self, most: int) -> "PageChanges":
        """Split off changes, `most` at most and removals first, so that whoever hears of them never holds more than there is."""
        taken = PageChanges()
        for mine, others in ((self.removed, taken.removed), (self.stored, taken.stored)):
            for _ in range(min(len(mine), most - len(taken))):
                others.add(mine.pop())
        return taken
