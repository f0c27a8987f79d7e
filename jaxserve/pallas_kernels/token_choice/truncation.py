"""Rows that truncate by top_k or typical_p, or want log probabilities; all others are left as race.py had them.

**Among the nearest.** The first pass leaves the largest logit of each lane of a block. The K-th largest of those bounds the K likeliest
tokens, and not many more lie within the bound. If top_k, min_p or the mass that top_p wants say that nothing beyond it can be kept, those
tokens are written one behind the other to a scratch row, and the rest of the work is done on them.

**By thresholds.** Else the whole row is read twice, each time with 15 values tried, which leaves a 256th of the range of distances. The
tokens of that are written to the scratch row, and the threshold is found among them by halving. Values are bit patterns of non-negative
floats, whose order as integers is their order as floats.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jaxserve.pallas_kernels.token_choice.row import Row

NUM_WARPS = 32
_INFINITY_BITS = 0x7F800000
_BLOCK = 4096  # tokens read at once, and lanes
_VECTOR = 4  # floats that a thread loads at once
_WAYS = 16
_NEAREST = 1024  # the K of rows without top_k, and the largest K of those with
_CAPACITY = 2 * _BLOCK  # tokens of a scratch row
SCRATCH_SIZE = _CAPACITY + _BLOCK  # the last block takes what an interpreted store would write elsewhere
_FAR = 32.0  # a distance beyond which a whole vocabulary is as nothing: 2**18 * exp(-32) < 1e-8
_HUGE = 1e30  # a distance whose weight is 0; times infinity that would be no number


def choose(*refs, vocab_size: int, threaded: bool):
    """The kernel; `threaded` where threads must wait for one another's writes."""
    *shared, counts_ref, last_ref, _, counts_out_ref, last_out_ref, tokens_ref, stats_ref, ids_ref, distances_ref = refs
    row = Row(shared, counts_ref, last_ref, vocab_size, _BLOCK)

    @pl.when(row.needs_truncation)
    def _():
        best, token, lanes = row.largest()
        scratch = _Scratch(row.number, (ids_ref, distances_ref), threaded)
        kept, truncation = _truncate(_Whole(row, best), scratch, (best - lanes) * row.inverse_temperature, row)
        stats = best, row.inverse_temperature, truncation.bound, truncation.mean, truncation.typical_bound, jnp.log(truncation.mass)
        for place, value in enumerate(stats):
            stats_ref[row.number, place] = value
        winner = lax.cond(row.draws, lambda: row.race(kept.fold, truncation.keeps)[1], lambda: token)
        row.keep(jnp.where(winner < 0, token, winner), tokens_ref, counts_out_ref, last_out_ref)  # none is kept of broken logits


class _Whole:
    """All tokens of a row by their distances, (best logit - logit) / temperature: a token's probability is exp(-distance) / mass."""

    def __init__(self, row: Row, best):
        self._row, self._best = row, best

    def fold(self, function, start):
        """function(carry, token ids [_BLOCK], distances [_BLOCK]) over all blocks; a distance is inf where there is no token."""
        return self._row.fold_distances(self._best, function, start)


class _List:
    """The first `count` tokens of a row of scratch, with their distances."""

    def __init__(self, number, refs, count):
        self._number, self._refs, self.count = number, refs, count

    def fold(self, function, start):
        """As _Whole's."""

        def run(i, carry):
            begin = i * _BLOCK
            present = begin + jnp.arange(_BLOCK, dtype=jnp.int32) < self.count
            ids_ref, distances_ref = (ref.at[self._number, pl.ds(begin, _BLOCK)] for ref in self._refs)
            return function(carry, plt.load(ids_ref, mask=present, other=0), plt.load(distances_ref, mask=present, other=jnp.inf))

        return lax.fori_loop(0, pl.cdiv(self.count, _BLOCK), run, start)


class _Scratch:
    """A row of scratch, and whoever writes it.

    Args:
        threaded: threads must wait for one another's writes.
    """

    def __init__(self, number, refs, threaded: bool):
        self._number, self._refs, self._threaded = number, refs, threaded

    def gather(self, whole: _Whole, keys: "_Keys", low, high):
        """Write down the tokens with keys in (low, high], as bits; no more than _CAPACITY of them.

        Returns:
            how many there are.
        """

        def write(count, token, distance):
            near = keys.between(distance, low, high)
            more = jnp.sum(near.astype(jnp.int32))

            @pl.when((more > 0) & (count + more <= _CAPACITY))
            def _():
                elsewhere = _CAPACITY + jnp.arange(_BLOCK, dtype=jnp.int32)  # interpreted, a masked store writes what was there
                place = jnp.where(near, count + jnp.cumsum(near.astype(jnp.int32)) - 1, elsewhere)
                for ref, values in zip(self._refs, (token, distance), strict=True):
                    plt.store(ref.at[self._number, place], values, mask=near)

            return count + more

        count = whole.fold(write, low * 0)
        if self._threaded:
            plt.debug_barrier()  # what a thread wrote others read
        return count

    def list(self, count) -> _List:
        """What was written."""
        return _List(self._number, self._refs, count)


class _Tokens:
    """The tokens among which a row draws: a list, or where that is empty all."""

    def __init__(self, whole: _Whole, scratch: _Scratch, count):
        self._whole, self._scratch, self._list = whole, scratch, scratch.list(count)

    def fold(self, function, start):
        """As _Whole's."""
        return lax.cond(self._list.count > 0, lambda: self._list.fold(function, start), lambda: self._whole.fold(function, start))

    def covering(self, keys: "_Keys", target, mass, reach):
        """Smallest key at or below which the weights sum to at least the target.

        Args:
            target: what they are to sum to.
            mass: the sum of all weights.
            reach: keys beyond it are looked for last.

        Returns:
            The key, inf if the weights never sum to the target; the sum of the weights up to it.
        """
        count = self._list.count
        nothing, too_many = count * 0, count * 0 + _CAPACITY + 1

        def narrow(carry):
            """Try 15 values between the bounds; from the second time on write down what is left."""
            number, low, high, below, within, _ = carry  # low does not cover the target, high does or is infinite
            span = high - low
            tried = []
            for part in range(1, _WAYS):
                by_value = lax.bitcast_convert_type(reach * (part / _WAYS), jnp.int32)
                by_bits = low + span // _WAYS * part + span % _WAYS * part // _WAYS
                tried.append(jnp.clip(jnp.where(number == 0, by_value, by_bits), low, high))

            def add(totals, _, distance):
                # A thread holds _VECTOR tokens side by side, so it adds up its own.
                bits, weights = (lax.reshape(x, (_BLOCK // _VECTOR, _VECTOR)) for x in (keys.bits(distance), keys.weight(distance)))
                return tuple(
                    total + jnp.sum(jnp.where(bits <= value, weights, 0.0), axis=1) for total, value in zip(totals, tried, strict=True)
                )

            totals = self._whole.fold(add, (jnp.zeros((_BLOCK // _VECTOR,), jnp.float32),) * len(tried))
            for value, total in zip(tried, totals, strict=True):
                found = jnp.sum(total)
                covers = (found >= target) | (value == high)
                lower, higher = ~covers & (value > low), covers & (value < high) & (value > low)
                low, below = jnp.where(lower, value, low), jnp.where(lower, found, below)
                high, within = jnp.where(higher, value, high), jnp.where(higher, found, within)
            left = lax.cond(number > 0, lambda: self._scratch.gather(self._whole, keys, low, high), lambda: too_many)
            return number + 1, low, high, below, within, left

        def unsettled(carry):
            _, low, high, _, _, left = carry
            return (high - low > 1) & (left > _CAPACITY)

        start = nothing, nothing - 1, nothing + _INFINITY_BITS, mass * 0, mass, jnp.where(count > 0, count, too_many)
        _, low, high, below, within, left = lax.while_loop(unsettled, narrow, start)
        listed = self._scratch.list(left)

        def halve(carry):
            low, high, within = carry
            value = low + (high - low) // 2
            found = below + _sum(listed, lambda distance: jnp.where(keys.bits(distance) <= value, keys.weight(distance), 0.0))
            covers = found >= target
            return jnp.where(covers, low, value), jnp.where(covers, value, high), jnp.where(covers, found, within)

        _, high, within = lax.while_loop(lambda carry: carry[1] - carry[0] > 1, halve, (low, high, within))
        return lax.bitcast_convert_type(high, jnp.float32), within


def _sum(tokens: _Whole | _List | _Tokens, term):
    """Sum over tokens of a function of distances [N]."""
    return jnp.sum(tokens.fold(lambda total, _, distance: total + term(distance), jnp.zeros((_BLOCK,), jnp.float32)))


class _Keys(NamedTuple):
    """By what a stage sorts tokens, |distance - middle|, and what it adds up.

    Attributes:
        bound: tokens at larger distances weigh nothing.
        counts: each token within the bound weighs 1, not exp(-distance).
    """

    middle: jax.Array
    bound: jax.Array
    counts: jax.Array

    def bits(self, distance):
        """int32 [N], whose order is that of the keys."""
        return lax.bitcast_convert_type(jnp.abs(distance - self.middle), jnp.int32)

    def weight(self, distance):
        """float32 [N]."""
        return jnp.where(distance <= self.bound, jnp.where(self.counts, 1.0, jnp.exp(-distance)), 0.0)

    def between(self, distance, low, high):
        """bool [N]: the key is in (low, high], and the token weighs something."""
        bits = self.bits(distance)
        return (bits > low) & (bits <= high) & (self.weight(distance) > 0)


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


def _truncate(whole: _Whole, scratch: _Scratch, lanes, row: Row) -> tuple[_Tokens, _Truncation]:
    """The tokens among which a row draws, and what of them it keeps."""
    top_k, top_p, min_p = row.top_k, row.top_p, row.min_p
    has_top_k, has_top_p, has_typical = top_k > 0, top_p < 1, row.typical_p < 1
    nothing = (top_k * 0).astype(jnp.float32)  # no literal: Pallas-Triton hands none out of a branch
    infinity = nothing + jnp.inf
    widest = jnp.where(min_p > 0, -jnp.log(jnp.where(min_p > 0, min_p, 1.0)), infinity)
    truncates = has_top_k | has_top_p | has_typical
    bound = lax.cond(truncates, lambda: _nearest_bound(lanes, jnp.where(has_top_k, top_k, _NEAREST)), lambda: nothing)

    def add(totals, _, d):
        mass, near_mass, number, moment, reach = totals
        weight = jnp.where(d <= widest, jnp.exp(-d), 0.0)
        moment += weight * jnp.where(d < _HUGE, d, 0.0)
        reach = jnp.maximum(reach, jnp.where(d < _FAR, d, 0.0))
        return mass + weight, near_mass + jnp.where(d <= bound, weight, 0.0), number + jnp.where(d <= bound, 1.0, 0.0), moment, reach

    *totals, reaches = whole.fold(add, (jnp.zeros((_BLOCK,), jnp.float32),) * 5)
    (mass, near_mass, number, moment), reach = (jnp.sum(total) for total in totals), jnp.max(reaches)
    # A little more than top_p: the sums are not added up in the order in which the threshold's are.
    is_enough = has_top_k | (has_top_p & (near_mass >= jnp.minimum(top_p * 1.0001, nothing + 1) * mass) & (near_mass < mass))
    gathers = truncates & (is_enough | (widest <= bound)) & (number <= _CAPACITY)
    near = _Keys(nothing, bound, has_top_k | ~has_top_k)
    bits = lax.bitcast_convert_type(bound, jnp.int32)
    count = lax.cond(gathers, lambda: scratch.gather(whole, near, top_k * 0 - 1, bits), lambda: top_k * 0)
    tokens = _Tokens(whole, scratch, count)

    def stage(i, carry):
        """Three times the same: top_k counts, top_p and typical_p weigh, each among what the one before keeps."""
        bound, mean, typical_bound, mass = carry
        wanted = jnp.where(i == 0, has_top_k, jnp.where(i == 1, has_top_p, has_typical))

        def moment_within():
            return _sum(tokens, lambda d: jnp.where(d <= bound, jnp.exp(-d), 0.0) * jnp.where(d < _HUGE, d, 0.0))

        def apply():
            expected = lax.cond((i == 2) & (has_top_k | has_top_p), moment_within, lambda: moment) / mass
            middle = jnp.where(i == 2, expected, 0.0)
            keys = _Keys(middle, bound, i == 0)
            target = jnp.where(i == 0, top_k.astype(jnp.float32), jnp.where(i == 1, top_p, row.typical_p) * mass)
            found, covered = tokens.covering(keys, target, mass, jnp.maximum(middle, reach - middle))
            new_bound = jnp.where(i == 2, bound, jnp.minimum(bound, found))

            def counted():
                return _sum(tokens, lambda d: jnp.where(d <= new_bound, jnp.exp(-d), 0.0))

            return new_bound, middle, jnp.where(i == 2, found, infinity), lax.cond(i == 0, counted, lambda: covered)

        return lax.cond(wanted, apply, lambda: (bound, mean, typical_bound, mass))

    return tokens, _Truncation(*lax.fori_loop(0, 3, stage, (widest, nothing, infinity, mass)))
