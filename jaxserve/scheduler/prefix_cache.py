"""Which pages already hold a prompt's beginning."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxserve.page_key import extend_keys
from jaxserve.prefix_match import first_page_seen, longest_prefix
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
        self._stored = [(pool.has, window) for pool, window in self._groups]
        self._page_size = page_size

    def extend_keys(self, keys: list[bytes], request: Request, token_ids: Sequence[int], num_pages: int) -> None:
        """Append the keys of a sample's pages up to num_pages, all of whose tokens are known."""
        extend_keys(keys, request, token_ids, self._page_size, num_pages)

    def match(self, keys: Sequence[bytes]) -> Prefix:
        """Return the longest prefix whose K/V every group can serve; its pages must be shared before anything is allocated.

        Args:
            keys: of as many leading pages as are wanted at most.
        """
        length = longest_prefix(self._stored, self._page_size, keys)
        num_tokens = length * self._page_size
        first = [first_page_seen(num_tokens, window, self._page_size) for _, window in self._groups]
        return Prefix(num_tokens, [[pool.find(key) for key in keys[i:length]] for (pool, _), i in zip(self._groups, first, strict=True)])
