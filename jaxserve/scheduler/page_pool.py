"""Who holds which KV page: reference counts, free pages, and pages kept for their content."""

from collections import OrderedDict

from jaxserve.page_changes import PageChanges


class PagePool:
    """The pages of one KV group. Each page is in one of three states:

        free    nobody holds it and its content is worth nothing
        held    referenced by one or more page tables; may be stored under a key as well
        cached  nobody holds it, but it is stored under a key: share() revives it, allocate() evicts the least recently used

    Every operation takes constant time.

    Args:
        num_pages: ids are 0 ... num_pages - 1.
        group: named where something is wrong.

    Attributes:
        changes: is told of stored and removed pages; None where nobody wants to know.
    """

    __slots__ = ("_cached", "_free", "_group", "_keys", "_pages", "_references", "changes", "num_pages")

    def __init__(self, num_pages: int, group: int = 0):
        self.num_pages = num_pages
        self.changes: PageChanges | None = None
        self._group = group
        self._free = list(range(num_pages - 1, -1, -1))  # the end is handed out first
        self._references = [0] * num_pages
        self._keys: list[bytes | None] = [None] * num_pages
        self._pages: dict[bytes, int] = {}  # key -> page
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def num_available(self) -> int:
        """Pages that allocate() can hand out: free and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_held(self) -> int:
        """Pages that are referenced."""
        return self.num_pages - self.num_available

    def allocate(self) -> int:
        """Hand out a page with one reference.

        Raises:
            KeyError: none is available; look at num_available first.
        """
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._cached.popitem(last=False)
            self._forget(page)
        self._references[page] = 1
        return page

    def share(self, page: int) -> None:
        """Add a reference to a held or cached page."""
        if self._references[page] == 0:
            del self._cached[page]
        self._references[page] += 1

    def release(self, page: int) -> None:
        """Take a reference away; with the last one the page becomes cached where it is stored, else free."""
        assert self._references[page] > 0, f"page {page} is released more often than held"
        self._references[page] -= 1
        if self._references[page]:
            return
        if self._keys[page] is None:
            self._free.append(page)
        else:
            self._cached[page] = None

    def is_held(self, page: int) -> bool:
        """Whether a page is referenced, so that sharing it takes nothing from num_available."""
        return self._references[page] > 0

    def store(self, page: int, key: bytes) -> None:
        """Make a held page's content findable. Where equal content is stored already, that page stays the one to be found."""
        if key in self._pages or self._keys[page] is not None:
            return
        self._pages[key] = page
        self._keys[page] = key
        if self.changes is not None:
            self.changes.store(key)

    def has(self, key: bytes) -> bool:
        """Whether a page is stored under a key."""
        return key in self._pages

    def find(self, key: bytes) -> int:
        """Return the page stored under a key; share() it before anything is allocated.

        Raises:
            KeyError: none is.
        """
        return self._pages[key]

    def stored(self) -> PageChanges:
        """Return all that is findable now, for somebody who was told nothing."""
        return PageChanges(self._pages)

    def check_integrity(self, references: dict[int, int]) -> None:
        """Compare with what the page tables say.

        Args:
            references: page -> times that it stands in page tables, of every page that does.

        Raises:
            AssertionError: naming the first thing that is wrong.
        """
        name = f"KV group {self._group}"
        held = {page: count for page, count in enumerate(self._references) if count}
        free, cached = set(self._free), set(self._cached)
        assert len(free) == len(self._free), f"{name}: a page is free twice"
        for page in held.keys() | references.keys():
            assert held.get(page, 0) == references.get(page, 0), (
                f"{name}: page {page} has {held.get(page, 0)} references and stands in {references.get(page, 0)} page tables"
            )
        total = len(free) + len(held) + len(cached)
        assert total == self.num_pages, f"{name}: {len(free)} free + {len(held)} held + {len(cached)} cached pages are not {self.num_pages}"
        assert not (free & cached or free & held.keys() or cached & held.keys()), f"{name}: a page is in two states"
        stored = {page for page, key in enumerate(self._keys) if key is not None}
        assert stored == set(self._pages.values()), f"{name}: keys and stored pages differ"
        assert cached <= stored and not stored & free, f"{name}: a cached page without key, or a free page with one"

    def _forget(self, page: int) -> None:
        key = self._keys[page]
        assert key is not None
        del self._pages[key]
        self._keys[page] = None
        if self.changes is not None:
            self.changes.remove(key)
