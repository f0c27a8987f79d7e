"""PrefillBudget: how many tokens of a step are for prompts, and how these share them."""

from bisect import bisect_left
from collections.abc import Iterable
from itertools import islice

from jaxserve.scheduler.config import SchedulerConfig

MOST_PADDING_ALONE = 128  # tokens; computing them costs about as much as a step of a few tokens
SHORT_SHARE = 4  # one part of so many of the budget is held for short prompts; those are short that fit into it
MAX_LOOKED_AT = 256  # prompts, in the search for short ones


def tokens_for_prompts(config: SchedulerConfig, num_decodes: int, wanted: Iterable[int], scores: bool = False) -> int:
    """Most tokens that prompts get in a step: what is left beside its decodes, fewer where their streams must not wait long.

    Where what there is to compute would leave much padding in the next larger size of a step, it is what fills a smaller one. What is
    left over joins the next step, which costs little beside decodes that run anyway; prompts alone would wait for it.

    Args:
        num_decodes: tokens of the step that are not of prompts.
        wanted: tokens that each prompt still needs, looked at until they use up the budget.
        scores: whether one of them is scored.
    """
    most = min(config.max_batch_tokens, config.max_scored_tokens or config.max_batch_tokens) if scores else config.max_batch_tokens
    budget, bound = most - num_decodes, config.max_prefill_tokens_while_decoding
    if bound is not None and num_decodes:
        budget = min(budget, max(1, bound() if callable(bound) else bound))
    num_wanted = 0
    for num_behind in wanted:
        if num_wanted >= budget:
            break
        num_wanted += num_behind
    total, sizes = num_decodes + min(budget, num_wanted), config.step_sizes
    above = bisect_left(sizes, total)
    if above in (0, len(sizes)):
        return budget
    padding, smaller = sizes[above] - total, sizes[above - 1] - num_decodes
    most_padding = total // 16 if num_decodes else MOST_PADDING_ALONE
    return smaller if padding > most_padding and smaller > (total - num_decodes) // 2 else budget


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
