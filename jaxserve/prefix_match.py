"""How much of a prompt is stored: asked by a scheduler of its own pages, and by a router of each engine's."""

from collections.abc import Callable, Sequence


def longest_prefix[Key](groups: Sequence[tuple[Callable[[Key], bool], int | None]], page_size: int, keys: Sequence[Key]) -> int:
    """Return how many of a prompt's first pages can be taken as they are, because every KV group has what the next token sees of them.

    Args:
        groups: of each whether it has a page stored under a key, and its window in tokens, None for all positions.
        page_size: tokens a page.
        keys: of the prompt's leading pages, in order.
    """
    length = wanted = len(keys)
    while True:
        for has, window in groups:
            length = _match_all(has, keys, length) if window is None else _match_window(has, window, page_size, keys, length)
        if length == wanted:  # no group took anything from what the others can serve
            return length
        wanted = length


def first_page_seen(position: int, window: int | None, page_size: int) -> int:
    """Return the logical index of the first page that the token at a position sees, its own position included in the window."""
    return 0 if window is None else max(0, position - window + 1) // page_size


def _match_all[Key](has: Callable[[Key], bool], keys: Sequence[Key], limit: int) -> int:
    for i in range(limit):
        if not has(keys[i]):
            return i
    return limit


def _match_window[Key](has: Callable[[Key], bool], window: int, page_size: int, keys: Sequence[Key], limit: int) -> int:
    """Return the longest length whose last window is stored: the pages that its next token sees, not those before."""
    length = limit
    for i in range(limit - 1, -1, -1):
        if not has(keys[i]):
            length = i
        elif i <= first_page_seen(length * page_size, window, page_size):
            return length
    return 0
