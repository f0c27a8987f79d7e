"""PrefixIndex: which prefixes of prompts an engine has in its cache."""

from collections import Counter
from collections.abc import Collection, Sequence
from functools import partial

from jaxserve.prefix_match import longest_prefix

MAX_PAGES_KEPT = 2**19  # of a KV group, about 38 MB; of more nothing is learned


class PrefixIndex:
    """The pages that one engine holds, as it tells itself, whoever's they are; and those that it is computing for this http process.

    The latter are a guess, and for the time only until the prompt's first output comes, because with it comes the truth.
    Pages are called by page_key.short_names().

    Args:
        page_size: tokens a page.
        windows: of each KV group, in tokens; 0 for all positions.
    """

    def __init__(self, page_size: int = 1, windows: Sequence[int] = (0,)) -> None:
        self._page_size = page_size
        self._held: list[set[int]] = [set() for _ in windows]
        self._expected: Counter[int] = Counter()  # by how many prompts
        self._groups = [(partial(self._has, held), window or None) for held, window in zip(self._held, windows, strict=True)]

    def __len__(self) -> int:
        return sum(map(len, self._held)) + len(self._expected)

    def match(self, pages: Sequence[int]) -> int:
        """How many of a prompt's first pages the engine need not compute, by the rule that it follows itself."""
        return longest_prefix(self._groups, self._page_size, pages)

    def change(self, group: int, stored: Collection[int], removed: Collection[int]) -> None:
        """The engine has told what changed in a KV group."""
        held = self._held[group]
        held.difference_update(removed)
        if len(held) + len(stored) <= MAX_PAGES_KEPT:
            held.update(stored)

    def expect(self, pages: Sequence[int]) -> None:
        """A prompt is sent."""
        self._expected.update(pages)

    def settle(self, pages: Sequence[int]) -> None:
        """A prompt that was sent is computed, or will not be."""
        for page in pages:
            if self._expected[page] > 1:
                self._expected[page] -= 1
            else:
                del self._expected[page]

    def _has(self, held: Collection[int], page: int) -> bool:
        return page in held or page in self._expected
