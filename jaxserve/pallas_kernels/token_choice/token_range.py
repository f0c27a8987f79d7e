"""What a shard of the vocabulary finds in its own range of each row: two kernels, with a word between the shards before the second.

The first finds the shard's largest logit, and writes down the adjusted logits of the rows that one shard must see whole. The second runs
the race of the rows that sample and are not among those, over distances from the largest logit of all shards: so a token has the very
score that it would have in the whole row, and the best of the shards' winners is the whole row's.
"""

import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxserve.pallas_kernels.token_choice.row import Row

NUM_WARPS = 32
_BLOCK = 4096  # tokens read at once: four a thread


def largest(*refs):
    """The first kernel: largest logit, its lowest token, adjusted logits where the row is needed whole."""
    *shared, counts_ref, last_ref, bounds_ref, best_ref, token_ref, adjusted_ref = refs
    row = _row(shared, counts_ref, last_ref, bounds_ref)
    best_ref[row.number], token_ref[row.number], _ = row.largest()

    @pl.when(row.needs_whole)
    def _():
        row.write(adjusted_ref)


def race(*refs):
    """The second: score and token of the winner, -1 and 0 where there is none; other rows get nothing."""
    *shared, counts_ref, last_ref, bounds_ref, best_ref, score_ref, token_ref = refs
    row = _row(shared, counts_ref, last_ref, bounds_ref)

    @pl.when(row.draws & ~row.needs_whole)
    def _():
        best, widest = best_ref[row.number], row.widest

        def fold(function, start):
            return row.fold_distances(best, function, start)

        score, winner, *_ = row.race(fold, lambda distance: distance <= widest)
        score_ref[row.number], token_ref[row.number] = score, jnp.maximum(winner, 0)


def _row(shared, counts_ref, last_ref, bounds_ref) -> Row:
    """`bounds_ref`: int32 [2], the shard's first token id, and how many it has."""
    return Row(shared, counts_ref, last_ref, bounds_ref[1], _BLOCK, first=bounds_ref[0])
