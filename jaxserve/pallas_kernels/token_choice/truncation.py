"""Rows that truncate by top_k or typical_p, or want log probabilities; all others are left as race.py had them.

**Among the nearest.** The first pass leaves the largest logit of each of 4096 lanes. The K-th largest of those bounds the K likeliest
tokens, and not many more lie within the bound. If top_k, min_p or the mass that top_p wants say that nothing beyond it can be kept, those
tokens are written one behind the other to a scratch row, and the rest of the work is done on them.

**By thresholds.** A search over the bit patterns of non-negative floats, whose order as integers is their order as floats, with 15 values
tried in each pass: 8 passes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jaxserve.pallas_kernels.token_choice.row import Row, lowest

NUM_WARPS = 16
_INFINITY_BITS = 0x7F800000
_BLOCK = 4096  # tokens read at once, and lanes
_LINES = 8  # a block is this many lines of consecutive tokens in a search, so that sums over them stay within a thread
_WAYS = 16
_NEAREST = 1024  # the K of rows without top_k, and the largest K of those with
_CAPACITY = _BLOCK  # tokens of a scratch row
SCRATCH_SIZE = _CAPACITY + _BLOCK  # the second half takes what an interpreted store would write elsewhere


def choose(*refs, vocab_size: int, threaded: bool):
    """The kernel; `threaded` where threads must wait for one another's writes."""
    *shared, counts_ref, last_ref, _, counts_out_ref, last_out_ref, tokens_ref, stats_ref, ids_ref, distances_ref = refs
    scratch_refs = ids_ref, distances_ref
    row = Row(shared, counts_ref, last_ref, vocab_size, _BLOCK)

    @pl.when(row.needs_truncation)
    def _():
        best, token, lanes = row.largest()
        everything = _Distances(row, best, scratch_refs, threaded)
        kept, truncation = _truncate(everything, (best - lanes) * row.inverse_temperature, row)
        stats = best, row.inverse_temperature, truncation.bound, truncation.mean, truncation.typical_bound, jnp.log(truncation.mass)
        for place, value in enumerate(stats):
            stats_ref[row.number, place] = value
        chosen = lax.cond(row.draws, lambda: _draw(kept, truncation, row, token), lambda: token)
        row.keep(chosen, tokens_ref, counts_out_ref, last_out_ref)


class _Distances:
    """Tokens of a row by their distances, (best logit - logit) / temperature: a token's probability is exp(-distance) / mass.

    Either the whole vocabulary, or the `count` tokens that `gather` wrote to the scratch row.
    """

    def __init__(self, row: Row, best, scratch_refs, threaded: bool, count=None):
        self._row, self._best, self._scratch_refs, self._threaded, self._count = row, best, scratch_refs, threaded, count
        self._num_blocks = row.num_blocks if count is None else 1 + (count == 0).astype(jnp.int32) * (row.num_blocks - 1)

    def _read(self, i):
        """Token ids [_BLOCK] of block i, and their distances; inf where there is none."""
        count = self._count
        if count is None:
            return self._row.distances(i, self._best)

        def gathered():
            number, place = self._row.number, pl.ds(0, _BLOCK)
            present = jnp.arange(_BLOCK, dtype=jnp.int32) < count
            token = plt.load(self._scratch_refs[0].at[number, place], mask=present, other=0)
            return token, plt.load(self._scratch_refs[1].at[number, place], mask=present, other=jnp.inf)

        return lax.cond(count == 0, lambda: self._row.distances(i, self._best), gathered)

    def fold(self, function, start):
        """function(carry, token ids [_BLOCK], distances [_BLOCK]) over all blocks."""
        return lax.fori_loop(0, self._num_blocks, lambda i, carry: function(carry, *self._read(i)), start)

    def sums(self, *terms):
        """For each term, a function of distances [N], its sum."""

        def add(totals, _, distance):
            return tuple(total + term(distance) for total, term in zip(totals, terms, strict=True))

        return tuple(jnp.sum(total) for total in self.fold(add, (jnp.zeros((_BLOCK,), jnp.float32),) * len(terms)))

    def covering(self, key, weight, target):
        """Smallest key at or below which the weights sum to at least the target; inf if they never do.

        Args:
            key, weight: functions of distances [N] to non-negative float32 [N].
        """

        def weigh(distance, tried):
            bits, weights = (
                lax.reshape(x, (_LINES, _BLOCK // _LINES)) for x in (lax.bitcast_convert_type(key(distance), jnp.int32), weight(distance))
            )
            return [jnp.sum(jnp.where(bits <= value, weights, 0.0), axis=0) for value in tried]

        def narrow(bounds):
            low, high = bounds  # low does not cover the target, high does or is infinite
            span = high - low
            tried = [jnp.minimum(low + span // _WAYS * part + span % _WAYS * part // _WAYS, high) for part in range(1, _WAYS)]

            def add(totals, _, distance):
                return tuple(total + more for total, more in zip(totals, weigh(distance, tried), strict=True))

            totals = self.fold(add, (jnp.zeros((_BLOCK // _LINES,), jnp.float32),) * len(tried))
            for value, total in zip(tried, totals, strict=True):
                enough = (jnp.sum(total) >= target) | (value == bounds[1])
                low, high = jnp.where(enough, low, jnp.maximum(low, value)), jnp.where(enough, jnp.minimum(high, value), high)
            return low, high

        _, high = lax.while_loop(lambda bounds: bounds[1] - bounds[0] > 1, narrow, (jnp.int32(-1), jnp.int32(_INFINITY_BITS)))
        return lax.bitcast_convert_type(high, jnp.float32)

    def gather(self, bound):
        """Write the tokens within a bound to the scratch row; no more than _CAPACITY of them.

        Returns:
            how many.
        """
        number = self._row.number

        def write(count, token, distance):
            near = distance <= bound
            more = jnp.sum(near.astype(jnp.int32))

            @pl.when(more > 0)
            def _():
                elsewhere = _CAPACITY + jnp.arange(_BLOCK, dtype=jnp.int32)  # interpreted, a masked store writes what was there
                place = jnp.where(near, count + jnp.cumsum(near.astype(jnp.int32)) - 1, elsewhere)
                for ref, values in zip(self._scratch_refs, (token, distance), strict=True):
                    plt.store(ref.at[number, place], values, mask=near)

            return count + more

        count = self.fold(write, jnp.int32(0))
        if self._threaded:
            plt.debug_barrier()  # what a thread wrote others read
        return count

    def only(self, count):
        """The first `count` tokens of the scratch row; all of the vocabulary for 0."""
        return _Distances(self._row, self._best, self._scratch_refs, self._threaded, count)


def _nearest_bound(lanes, number):
    """A distance within which there are at least `number` tokens, the likeliest.

    Args:
        lanes: float32 [_BLOCK], smallest distance of each lane; NaN counts as infinite.
    """
    bits = lax.bitcast_convert_type(jnp.where(lanes >= 0, lanes, jnp.inf), jnp.int32)

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        enough = jnp.sum((bits <= middle).astype(jnp.int32)) >= number
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    _, high = lax.fori_loop(0, 31, halve, (jnp.int32(-1), jnp.int32(_INFINITY_BITS)))
    return lax.bitcast_convert_type(high, jnp.float32)


class _Truncation(NamedTuple):
    """What a row keeps: tokens within bound and typical_bound (see runner.distribution).

    Attributes:
        mass: sum of exp(-distance) over the tokens within the bounds.
    """

    bound: jax.Array
    mean: jax.Array
    typical_bound: jax.Array
    mass: jax.Array

    def keeps(self, distance):
        return (distance <= self.bound) & (jnp.abs(distance - self.mean) <= self.typical_bound)


def _truncate(everything: _Distances, lanes, row: Row) -> tuple[_Distances, _Truncation]:
    """The tokens among which a row draws, and what of them it keeps."""
    top_k, top_p, min_p = row.top_k, row.top_p, row.min_p
    has_top_k, has_top_p, has_typical = top_k > 0, top_p < 1, row.typical_p < 1
    nothing = (top_k * 0).astype(jnp.float32)  # no literal: Pallas-Triton hands none out of a branch
    infinity = nothing + jnp.inf
    widest = jnp.where(min_p > 0, -jnp.log(jnp.where(min_p > 0, min_p, 1.0)), infinity)
    bound = _nearest_bound(lanes, jnp.where(has_top_k, top_k, _NEAREST))
    mass, near_mass, number = everything.sums(
        lambda d: jnp.where(d <= widest, jnp.exp(-d), 0.0),
        lambda d: jnp.where(d <= jnp.minimum(bound, widest), jnp.exp(-d), 0.0),
        lambda d: jnp.where(d <= bound, 1.0, 0.0),
    )
    # A little more than top_p: the sums are not added up in the order in which the threshold's are.
    is_enough = has_top_k | (has_top_p & (near_mass >= jnp.minimum(top_p * 1.0001, nothing + 1) * mass) & (near_mass < mass))
    gathers = (has_top_k | has_top_p | has_typical) & (is_enough | (widest <= bound)) & (number <= _CAPACITY)
    tokens = everything.only(lax.cond(gathers, lambda: everything.gather(bound), lambda: top_k * 0))

    def stage(i, carry):
        """Three times the same: top_k counts, top_p and typical_p weigh, each among what the one before keeps."""
        bound, mean, typical_bound, mass = carry
        wanted = jnp.where(i == 0, has_top_k, jnp.where(i == 1, has_top_p, has_typical))
        share = jnp.where(i == 1, top_p, row.typical_p)

        def apply():
            (moment,) = tokens.sums(lambda d: jnp.where((d <= bound) & (d < 1e30), jnp.exp(-d) * jnp.minimum(d, 1e30), 0.0))
            middle = jnp.where(i == 2, moment / mass, 0.0)
            target = jnp.where(i == 0, top_k.astype(jnp.float32), share * mass)
            found = tokens.covering(
                lambda d: jnp.abs(d - middle), lambda d: jnp.where(d <= bound, jnp.where(i == 0, 1.0, jnp.exp(-d)), 0.0), target
            )
            new_bound = jnp.where(i == 2, bound, jnp.minimum(bound, found))
            new_typical = jnp.where(i == 2, found, infinity)
            (new_mass,) = tokens.sums(lambda d: jnp.where((d <= new_bound) & (jnp.abs(d - middle) <= new_typical), jnp.exp(-d), 0.0))
            return new_bound, middle, new_typical, new_mass

        return lax.cond(wanted, apply, lambda: (bound, mean, typical_bound, mass))

    return tokens, _Truncation(*lax.fori_loop(0, 3, stage, (widest, nothing, infinity, mass)))


def _draw(tokens: _Distances, truncation: _Truncation, row: Row, most_likely):
    """The token with the largest probability / noise among those kept; the most likely one if none is (broken logits)."""

    def run(carry, token, distance):
        scores, winners = carry
        kept = truncation.keeps(distance) & (distance < jnp.inf)
        score = jnp.where(kept, jnp.exp(-distance) / row.noise(token), -1.0)
        wins = (score > scores) | ((score == scores) & (token < winners))
        return jnp.where(wins, score, scores), jnp.where(wins, token, winners)

    scores, winners = tokens.fold(run, (jnp.full((_BLOCK,), -1.0, jnp.float32), jnp.arange(_BLOCK, dtype=jnp.int32)))
    best = jnp.max(scores)
    return jnp.where(best >= 0, lowest(scores == best, winners), most_likely)
