"""PageWatchers: who is told which pages a scheduler has stored and removed."""

from collections.abc import Sequence
from typing import Protocol

from jaxserve.page_changes import PageChanges
from jaxserve.scheduler.page_pool import PagePool


class PageWatcher(Protocol):
    """Somebody who knows which pages are stored. Called by the scheduler's thread: it must not block."""

    def put_pages(self, changes: Sequence[PageChanges]) -> None:
        """Take what changed in each KV group since the last call, the first time all that is stored. Others get the same objects."""
        ...


class PageWatchers:
    """Tells watchers of some pools' pages. While there are none nothing is noted. Not thread-safe.

    Args:
        pools: one a KV group.
    """

    def __init__(self, pools: Sequence[PagePool]):
        self._pools = pools
        self._watchers: list[PageWatcher] = []
        self._new: list[PageWatcher] = []  # that were told nothing yet
        self._noting = False

    def add(self, watcher: PageWatcher) -> None:
        """Tell a watcher from the next tell() on; who watches already is ignored."""
        if watcher not in self._watchers and watcher not in self._new:
            self._new.append(watcher)

    def remove(self, watcher: PageWatcher) -> None:
        """Tell a watcher no more; who does not watch is ignored."""
        self._watchers = [each for each in self._watchers if each is not watcher]
        self._new = [each for each in self._new if each is not watcher]

    def tell(self) -> None:
        """Tell each watcher what changed since it was told last. No step may be under way, unlike for add() and remove()."""
        if self._noting:
            changes = self._take()
            if any(changes):
                for watcher in self._watchers:
                    watcher.put_pages(changes)
        if self._new:
            stored = [pool.stored() for pool in self._pools]
            for watcher in self._new:
                watcher.put_pages(stored)
            self._watchers += self._new
            self._new = []
        if self._noting != bool(self._watchers):
            self._noting = not self._noting
            for pool in self._pools:
                pool.changes = PageChanges() if self._noting else None

    def _take(self) -> list[PageChanges]:
        changes = []
        for pool in self._pools:
            assert pool.changes is not None
            changes.append(pool.changes)
            if pool.changes:
                pool.changes = PageChanges()
        return changes
