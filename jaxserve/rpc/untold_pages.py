"""UntoldPages: what an http process was not told yet of an engine's pages."""

import threading
from collections.abc import Sequence

from jaxserve.page_changes import PageChanges
from jaxserve.page_key import short_names
from jaxserve.rpc import engine_pb2 as pb

# Of all KV groups in one message: 16 KB, of which making holds up the engine's GIL by less than a millisecond (benchmarks/page_changes.py).
# A step of 8192 tokens stores 512 pages and may remove as many; the rest is for what was told nothing yet.
MAX_CHANGES = 2048


class UntoldPages:
    """Changes between the engine's thread, which puts them, and the writer of a stream, which takes them in messages.

    A client that does not read costs no more memory than one key for each page that it was told of and for each that there is.
    """

    def __init__(self) -> None:
        # The engine's thread must not wait while messages are made: it adds to `_new`, which the writer takes as a whole.
        self._lock = threading.Lock()
        self._new: list[PageChanges] = []
        self._untold: list[PageChanges] = []  # the writer's own

    def put(self, changes: Sequence[PageChanges]) -> None:
        """Add what changed in each KV group (engine's thread)."""
        with self._lock:
            if not self._new:
                self._new = [PageChanges() for _ in changes]
            for mine, later in zip(self._new, changes, strict=True):
                mine.extend(later)

    def take(self) -> list[pb.PageChanges]:
        """Return the next changes to tell, MAX_CHANGES at most (writer)."""
        self._untold = self._all()
        messages, left = [], MAX_CHANGES
        for group, changes in enumerate(self._untold):
            if left and changes:
                taken = changes.take(left)
                left -= len(taken)
                messages.append(pb.PageChanges(group=group, stored=short_names(taken.stored), removed=short_names(taken.removed)))
        return messages

    @property
    def more(self) -> bool:
        """Whether the last take() left something (writer)."""
        return any(self._untold)

    def _all(self) -> list[PageChanges]:
        with self._lock:
            new, self._new = self._new, []
        if not any(self._untold):
            return new
        if new:
            for mine, later in zip(self._untold, new, strict=True):
                mine.extend(later)
        return self._untold
