"""Which pages already hold a prompt's beginning."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxserve.page_key import extend_keys
from jaxserve.request import Request
from jaxserve.scheduler.page_pool import PagePool


@dataclass(slots=True)
class Prefix:
    """K/V that a sample need not compute.

    Attributes:
        num_tokens: of positions 0 ... num_tokens - 1.
        pages: for each KV group the full pages to share, in logical order; those that the next token does not see are left out.
        partial_pages: for each KV group the page to copy, which holds the tokens after the full pages; empty where there are none.
    """

    num_tokens: int
    pages: Sequence[Sequence[int]]
    partial_pages: Sequence[int] = ()


class PrefixCache:
    """Finds stored pages by the tokens that they, and all pages before them, hold.

    A page is stored in its pool under a key once its step was **collected**: then its tokens are known and its K/V is written whatever
    became of other steps, so a failed step leaves nothing to take back. The price is that equal prompts arriving within the same two
    steps are computed each.

    Args:
        pools: one a KV group; a page of logical index i has the same key in each.
        windows: of each group; None for all positions.
        page_size: tokens a page.
    """

    def __init__(self, pools: Sequence[PagePool], windows: Sequence[int | None], page_size: int):
        self._groups = list(zip(pools, windows, strict=True))
        self._page_size = page_size

    def extend_keys(self, keys: list[bytes], request: Request, token_ids: Sequence[int], num_pages: int) -> None:
        """Append the keys of a sample's pages up to num_pages, all of whose tokens are known."""
        extend_keys(keys, request, token_ids, self._page_size, num_pages)

    def match(self, keys: Sequence[bytes]) -> Prefix:
        """Return the longest prefix whose K/V every group can serve; its pages must be shared before anything is allocated.

        Args:
            keys: of as many leading pages as are wanted at most.
        """
        length = wanted = len(keys)
        while True:
            for pool, window in self._groups:
                length = _match_all(pool, keys, length) if window is None else self._match_window(pool, window, keys, length)
            if length == wanted:  # no group took anything from what the others can serve
                break
            wanted = length
        num_tokens = length * self._page_size
        first = [first_page_seen(num_tokens, window, self._page_size) for _, window in self._groups]
        return Prefix(num_tokens, [[pool.find(key) for key in keys[i:length]] for (pool, _), i in zip(self._groups, first, strict=True)])

    def _match_window(self, pool: PagePool, window: int, keys: Sequence[bytes], limit: int) -> int:
        """Return the longest length whose last window is stored: the pages that its next token sees, not those before."""
        length = limit
        for i in range(limit - 1, -1, -1):
            if not pool.has(keys[i]):
                length = i
            elif i <= first_page_seen(length * self._page_size, window, self._page_size):
                return length
        return 0


def _match_all(pool: PagePool, keys: Sequence[bytes], limit: int) -> int:
    for i in range(limit):
        if not pool.has(keys[i]):
            return i
    return limit


def first_page_seen(position: int, window: int | None, page_size: int) -> int:
    """Return the logical index of the first page that the token at a position sees, its own position included in the window."""
    return 0 if window is None else max(0, position - window + 1) // page_size
