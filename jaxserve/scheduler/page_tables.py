"""The memory half of the scheduler: the page tables of all samples over the pools of all KV groups."""

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence

from jaxserve.prefix_match import first_page_seen
from jaxserve.scheduler.config import KVGroupPages, SchedulerConfig
from jaxserve.scheduler.page_pool import PagePool
from jaxserve.scheduler.prefix_cache import Prefix, PrefixCache
from jaxserve.scheduler.sample import Sample


class PageTables:
    """Gives pages to samples and takes them back.

    A sample writes only to positions that nobody computed for it, and these are never in a shared page: full pages are shared, a partial
    one is copied. The device runs steps, and the copies before them, in the order in which they were scheduled.

    Args:
        config: page size, prefix caching, tokens a step.
        groups: the memory.
    """

    def __init__(self, config: SchedulerConfig, groups: Sequence[KVGroupPages]):
        self.pools = [PagePool(group.num_pages, i) for i, group in enumerate(groups)]
        self._windows = [group.window for group in groups]
        self._page_size = config.page_size
        self._cache = PrefixCache(self.pools, self._windows, config.page_size) if config.prefix_caching else None
        # A row may yield K tokens more than it counts for, and so may the row in flight before it.
        self._margin = 2 * config.num_speculative_tokens
        # A window's tokens lie in at most this many pages, wherever it begins; a step's tokens in so many more.
        self._window_pages = [None if window is None else self._pages(window - 1 + self._margin) + 1 for window in self._windows]
        self._step_pages = self._pages(config.max_batch_tokens)

    def can_ever_hold(self, num_tokens: int) -> bool:
        """Whether a sample that has the memory to itself can compute this many tokens."""
        needs = (self._pages(num_tokens) if pages is None else min(self._pages(num_tokens), pages) for pages in self._window_pages)
        return all(need <= pool.num_pages for need, pool in zip(needs, self.pools, strict=True))

    def keeps_prompt(self, source: Sample, sample: Sample) -> bool:
        """Whether a running sample has freed nothing that another one of its request would take over."""
        num_tokens = _num_shared(sample)
        return all(
            freed <= first_page_seen(num_tokens, window, self._page_size)
            for freed, window in zip(source.num_freed_pages, self._windows, strict=True)
        )

    def admit(self, sample: Sample, source: Sample | None, headroom: int, page_copies: list[tuple[int, int, int]]) -> bool:
        """Make a sample's page tables if there is memory for all its tokens.

        Args:
            sample: holds no pages; all its tokens are known.
            source: has computed the prompt and keeps_prompt(); the sample takes that over. None: it takes what is cached.
            headroom: pages of each group to leave alone.
            page_copies: (group, source, target) of the pages to copy are appended.

        Returns:
            False where memory lacks; nothing has changed then.
        """
        if sample.lacking is not None:  # spares the search for a prefix, step after step
            group, needed = sample.lacking
            if self.pools[group].num_available < needed + headroom:
                return False
        prefix = self._cached_prefix(sample) if source is None else self._prompt_prefix(sample, source)
        sample.lacking = self._find_lacking(sample, prefix, headroom)
        if sample.lacking is not None:
            return False
        self._open(sample, prefix, page_copies)
        return True

    def grow(self, sample: Sample, num_tokens: int) -> int:
        """Give a sample the pages for its next tokens.

        Args:
            sample: holds its page tables.
            num_tokens: how many it would compute next.

        Returns:
            how many it can compute next; fewer, or none, where memory lacks.
        """
        reach = self._reach(sample, sample.num_computed_tokens + num_tokens)
        missing = self._pages(reach) - len(sample.page_tables[0])
        if missing > self._num_available():
            self._free_behind_windows(sample)
        count = min(missing, self._num_available())
        if count > 0:
            for pool, table in zip(self.pools, sample.page_tables, strict=True):
                table.extend([pool.allocate() for _ in range(count)])
            self._measure_room(sample)
        return num_tokens if count >= missing else max(0, sample.room - sample.num_computed_tokens)

    def settle(self, sample: Sample) -> None:
        """Store the pages that collected steps have filled, then free those that fell behind a window.

        Args:
            sample: its num_settled_tokens tokens are known and their K/V is written.
        """
        num_full = sample.num_settled_tokens // self._page_size
        if self._cache is not None:
            keys = sample.page_keys
            self._cache.extend_keys(keys, sample.request, sample.token_ids, num_full)
            for pool, table, freed in zip(self.pools, sample.page_tables, sample.num_freed_pages, strict=True):
                for i in range(max(freed, sample.num_stored_pages), num_full):
                    pool.store(table[i], keys[i])
        sample.num_stored_pages = num_full
        sample.settle_at = (num_full + 1) * self._page_size
        self._free_behind_windows(sample)

    def release(self, sample: Sample) -> None:
        """Take all pages of a sample back, the last first: of those that stay cached the beginnings are evicted last."""
        for pool, table, freed in zip(self.pools, sample.page_tables, sample.num_freed_pages, strict=True):
            for i in range(len(table) - 1, freed - 1, -1):
                pool.release(table[i])
        sample.page_tables = []
        sample.num_freed_pages = []
        sample.room = 0

    def check_integrity(self, holders: Iterable[Sample]) -> None:
        """Compare the pools with the page tables.

        Args:
            holders: all samples that hold pages.

        Raises:
            AssertionError: naming what is wrong.
        """
        references = [Counter[int]() for _ in self.pools]
        for sample in holders:
            assert len({len(table) for table in sample.page_tables}) == 1, f"page tables of different lengths: {sample.request.request_id}"
            for count, table, freed in zip(references, sample.page_tables, sample.num_freed_pages, strict=True):
                count.update(table[freed:])
        for pool, count in zip(self.pools, references, strict=True):
            pool.check_integrity(count)

    def _cached_prefix(self, sample: Sample) -> Prefix:
        """Return what the prefix cache holds of a sample; at least one token is left to compute."""
        if self._cache is None or sample.scores_prompt:
            return Prefix(0, [() for _ in self.pools])
        limit = (sample.num_tokens - 1) // self._page_size
        self._cache.extend_keys(sample.page_keys, sample.request, sample.token_ids, limit)
        return self._cache.match(sample.page_keys[:limit])

    def _prompt_prefix(self, sample: Sample, source: Sample) -> Prefix:
        """Return what a sample takes over from one that has computed the same prompt; at least one token is left to compute."""
        num_tokens = _num_shared(sample)
        length, rest = divmod(num_tokens, self._page_size)
        first = [first_page_seen(num_tokens, window, self._page_size) for window in self._windows]
        pages = [table[i:length] for table, i in zip(source.page_tables, first, strict=True)]
        return Prefix(num_tokens, pages, [table[length] for table in source.page_tables] if rest else ())

    def _find_lacking(self, sample: Sample, prefix: Prefix, headroom: int) -> tuple[int, int] | None:
        """Return a KV group without the memory for a sample, and the pages of it that the sample needs; None if there is enough."""
        length = prefix.num_tokens // self._page_size
        for group, (pool, pages, window_pages) in enumerate(zip(self.pools, prefix.pages, self._window_pages, strict=True)):
            fresh = self._pages(self._reach(sample, sample.num_tokens)) - length
            if window_pages is not None:  # the others are freed before it needs more
                fresh = min(fresh, window_pages + self._step_pages)
            revived = sum([not pool.is_held(page) for page in pages])
            needed = min(fresh + revived, pool.num_pages)
            if pool.num_available < needed + headroom:
                return group, needed
        return None

    def _open(self, sample: Sample, prefix: Prefix, page_copies: list[tuple[int, int, int]]) -> None:
        """Make a sample's page tables, which hold a prefix."""
        length = prefix.num_tokens // self._page_size
        for pool, pages in zip(self.pools, prefix.pages, strict=True):  # before allocate() could evict them
            for page in pages:
                pool.share(page)
        sample.num_freed_pages = [length - len(pages) for pages in prefix.pages]
        sample.page_tables = [array("i", [0] * (length - len(pages))) + array("i", pages) for pages in prefix.pages]
        for group, page in enumerate(prefix.partial_pages):
            target = self.pools[group].allocate()
            sample.page_tables[group].append(target)
            page_copies.append((group, page, target))
        sample.num_computed_tokens = sample.num_settled_tokens = prefix.num_tokens
        sample.num_stored_pages = length
        sample.settle_at = (length + 1) * self._page_size
        self._measure_room(sample)

    def _free_behind_windows(self, sample: Sample) -> None:
        """Free the pages that no token after the settled ones sees."""
        for group, window in enumerate(self._windows):
            if window is None:
                continue
            pool, table = self.pools[group], sample.page_tables[group]
            first = first_page_seen(sample.num_settled_tokens, window, self._page_size)
            for i in range(sample.num_freed_pages[group], first):
                pool.release(table[i])
                table[i] = 0
                sample.num_freed_pages[group] = i + 1

    def _num_available(self) -> int:
        return min([pool.num_available for pool in self.pools])

    def _reach(self, sample: Sample, num_tokens: int) -> int:
        """Return how many positions a sample may write once this many are counted; the last token of all is never computed."""
        return min(num_tokens + self._margin, sample.max_num_tokens - 1)

    def _measure_room(self, sample: Sample) -> None:
        sample.room = len(sample.page_tables[0]) * self._page_size - self._margin

    def _pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self._page_size)


def _num_shared(sample: Sample) -> int:
    """Return how many tokens a sample can take over from one with the same prompt."""
    return min(sample.num_prompt_tokens, sample.num_tokens - 1)
