"""PrefillBudget: how the tokens of a step that are left beside decodes are shared by prompts, long and short."""

from collections.abc import Iterable
from itertools import islice

SHORT_SHARE = 4  # one part of so many of the budget is for short prompts, and they are those that fit into it
MAX_LOOKED_AT = 256  # prompts, in the search for short ones


class PrefillBudget:
    """What is left of a step's tokens.

    Prompts take it first come, first served. But where long ones would take all of it, for many steps perhaps, a part is held for short
    ones that came later: a long prompt hardly notices, and a short one does not wait for several long ones. The tokens a step computes
    stay the same.

    Args:
        num_tokens: to be shared.
        prompts: tokens that each prompt still needs, in order of arrival.
    """

    def __init__(self, num_tokens: int, prompts: Iterable[int]):
        self.left = num_tokens
        self._short = num_tokens // SHORT_SHARE
        wanted = behind_long = 0  # tokens; the second of short prompts that came after a long one
        long_came = False
        for num_behind in islice(prompts, MAX_LOOKED_AT):
            wanted += num_behind
            long_came |= num_behind > self._short
            if long_came and num_behind <= self._short:
                behind_long += num_behind
                if behind_long >= self._short and wanted > num_tokens:
                    break
        self._held = min(behind_long, self._short) if wanted > num_tokens else 0

    def most(self, num_behind: int) -> int:
        """Most tokens that a prompt may take that needs so many."""
        return min(num_behind, self.left if num_behind <= self._short else self.left - self._held)

    def take(self, num_behind: int, num_tokens: int) -> None:
        """Count tokens that go to a prompt that needed `num_behind`."""
        self.left -= num_tokens
        if num_behind <= self._short:
            self._held = max(0, self._held - num_tokens)
        self._held = min(self._held, self.left)
