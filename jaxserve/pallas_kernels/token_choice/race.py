"""Rows that are greedy, or sample with no truncation but min_p and top_p. A greedy row is one pass over its logits, a sampled one two, with
top_p mostly three.

**top_p** needs no threshold. The noise of a token depends on nothing but (seed, position, token id), so a winner of the race among all
tokens that is itself kept is the winner among those kept. It is kept if the likelier tokens have less mass than asked for; otherwise it
and all that is not likelier drop out, and the race is run again (rejection sampling as in FlashInfer, arXiv 2501.01005, made
deterministic).
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxserve.pallas_kernels.token_choice.row import Row

NUM_WARPS = 32
_BLOCK = 4096  # tokens read at once: four a thread


def choose(*refs, vocab_size: int, only_truncated: bool = False):
    """The kernel. Rows of truncation.py's are left alone, but for their tokens, which it writes again.

    Args:
        vocab_size: V.
        only_truncated: rows that truncate by no more than min_p are left alone, too.
    """
    *shared, counts_ref, last_ref, counts_out_ref, last_out_ref, tokens_ref = refs
    row = Row(shared, counts_ref, last_ref, vocab_size, _BLOCK)

    mine = ~row.needs_truncation

    @pl.when(mine & row.needs_whole if only_truncated else mine)
    def _():
        best, token, _ = row.largest()
        row.keep(lax.cond(row.draws, lambda: _draw(row, best, token), lambda: token), tokens_ref, counts_out_ref, last_out_ref)


def _draw(row: Row, best, most_likely):
    """The token with the largest probability / noise among those kept; the most likely one if none is (broken logits)."""
    nothing, widest = best * 0, row.widest

    def fold(function, start):
        return row.fold_distances(best, function, start)

    def likelier(distance):
        """Mass of the tokens nearer than a distance."""

        def add(mass, _, others):
            return mass + jnp.where(others < distance, jnp.exp(-others), 0.0)

        return jnp.sum(fold(add, jnp.zeros((row.block,), jnp.float32)))

    def round(carry):
        limit, whole, _, _ = carry
        _, winner, distance, mass = row.race(fold, lambda others: others <= limit)
        whole = jnp.where(whole < 0, mass, whole)  # the first round's
        unchecked = (row.top_p >= 1) | (winner < 0) | (distance <= 0)
        above = lax.cond(unchecked, lambda: jnp.minimum(distance, 0.0) - 1, lambda: likelier(distance))  # no literal leaves a branch
        below = lax.bitcast_convert_type(lax.bitcast_convert_type(distance, jnp.int32) - 1, jnp.float32)
        done = unchecked | (above < row.top_p * whole)
        return jnp.where(done, limit, below), whole, jnp.where(winner < 0, most_likely, winner), done

    start = nothing + widest, nothing - 1, most_likely, most_likely < 0
    return lax.while_loop(lambda carry: ~carry[3], round, start)[2]
