"""PrefillBudget: how prompts share the tokens of a step that are left beside decodes."""

from collections.abc import Iterable
from itertools import islice

SHORT_SHARE = 4  # one part of so many of the budget is held for short prompts; those are short that fit into it
MAX_LOOKED_AT = 256  # prompts, in the search for short ones


class PrefillBudget:
    """What is left of a step's tokens.

    Prompts take it first come, first served. But while a long prompt is scored (its log probabilities are wanted, nothing of it is taken
    from the cache, and its steps take longer) a part is held for short ones that came later. A step computes as many tokens as without.

    Args:
        num_tokens: to be shared.
        prompts: in order of arrival, tokens that each still needs and whether it is scored; none where none is scored.
    """

    def __init__(self, num_tokens: int, prompts: Iterable[tuple[int, bool]] = ()):
        self.left = num_tokens
        self._short = num_tokens // SHORT_SHARE
        self._held = 0
        wanted = behind_scored = 0  # tokens; the second of short prompts that came after a long one that is scored
        long_came = False
        for num_behind, scored in islice(prompts, MAX_LOOKED_AT):
            wanted += num_behind
            long_came |= scored and num_behind > self._short
            if long_came and num_behind <= self._short:
                behind_scored += num_behind
            if behind_scored >= self._short and wanted > num_tokens:
                break
        if wanted > num_tokens:
            self._held = min(behind_scored, self._short)

    def most(self, num_behind: int, scored: bool) -> int:
        """Most tokens that a prompt may take that needs so many."""
        return min(num_behind, self.left - self._held if scored and num_behind > self._short else self.left)

    def take(self, num_behind: int, num_tokens: int) -> None:
        """Count tokens that go to a prompt that needed `num_behind`."""
        self.left -= num_tokens
        if num_behind <= self._short:
            self._held = max(0, self._held - num_tokens)
        self._held = min(self._held, self.left)
