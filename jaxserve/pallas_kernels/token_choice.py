"""One token a row of logits, chosen by one kernel on NVIDIA GPUs from sm_80 on, in Pallas-Triton.

A program is a row, and a row runs only what it asks for: nothing of it needs the host, where XLA's conditionals and loops would bring
their predicates to the host and end the CUDA graph. A greedy row is one pass over its logits, a sampled one two.

**Truncation among the nearest.** The first pass leaves the largest logit of each of 4096 lanes. The K-th largest of those bounds the K
likeliest tokens, and not many more lie within the bound. If top_k, min_p or the mass that top_p wants say that nothing beyond it can be
kept, those tokens are written one behind the other to a scratch row, and the rest of the work is done on them.

**Truncation by thresholds** is a search over the bit patterns of non-negative floats, whose order as integers is their order as floats,
with 15 values tried in each pass: 8 passes.

**top_p of a flat distribution** needs no threshold. The noise of a token depends on nothing but (seed, position, token id), so a winner of
the race among all tokens that is itself kept is the winner among those kept. It is kept if the likelier tokens have less mass than asked
for; otherwise it and all that is not likelier drop out, and the race is run again (rejection sampling as in FlashInfer, arXiv 2501.01005,
made deterministic).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jaxserve.pallas_kernels.noise import exponential_noise, is_green
from jaxserve.pallas_kernels.token_options import ADJUSTS, Column, Flag, adjust_logits

_INFINITY_BITS = 0x7F800000
_BLOCK = 4096  # tokens read at once, and lanes
_LINES = 8  # a block is this many lines of consecutive tokens in a search, so that sums over them stay within a thread
_WAYS = 16
_NEAREST = 1024  # the K of rows without top_k, and the largest K of those with
_CAPACITY = _BLOCK  # tokens of a scratch row
_NUM_WARPS = 16


class TokenChoice(NamedTuple):
    """What `choose_tokens` returns.

    Attributes:
        token_ids: int32 [R].
        stats: float32 [R, 6], the attributes of runner.distribution.Distribution in their order. Meant only for rows with LOGPROBS.
        token_counts, last_tokens: the state with the tokens of the rows that sample.
    """

    token_ids: jax.Array
    stats: jax.Array
    token_counts: jax.Array
    last_tokens: jax.Array


def choose_tokens(
    logits: jax.Array,
    columns: jax.Array,
    noise_keys: tuple[jax.Array, jax.Array],
    token_counts: jax.Array,
    bias: jax.Array,
    last_tokens: jax.Array,
    masks: jax.Array | None,
    *,
    interpret: bool = False,
) -> TokenChoice:
    """Logit bias, bans, penalties, mask; temperature, min_p, top_k, top_p, typical_p; Gumbel-max, or argmax for greedy rows.

    Ties: the lowest token id wins; a truncation keeps or drops equal logits together.

    Args:
        logits: float32 [R, V].
        columns: int32 [R, len(Column)], see Column.
        noise_keys: see noise.py.
        token_counts: int32 [S, V] by slot: times each token was output, plus PROMPT_FLAG and BAN_FLAG.
        bias: float32 [S, V] by slot.
        last_tokens: int32 [S, 1+K] by slot.
        masks: uint32 [R, ceil(V / 32)], bit t % 32 of word t // 32 allows token t; None allows all.
        interpret: run on the CPU, for tests.
    """
    num_rows, _ = logits.shape
    floats = lax.bitcast_convert_type(columns, jnp.float32)
    operands = [logits, columns, floats, jnp.stack(noise_keys, axis=1), bias, token_counts, last_tokens]
    operands += [] if masks is None else [masks]
    outputs = (
        jax.ShapeDtypeStruct((num_rows,), jnp.int32),
        jax.ShapeDtypeStruct((num_rows, 6), jnp.float32),
        jax.ShapeDtypeStruct(token_counts.shape, jnp.int32),
        jax.ShapeDtypeStruct(last_tokens.shape, jnp.int32),
        jax.ShapeDtypeStruct((num_rows, _CAPACITY + _BLOCK), jnp.int32),
        jax.ShapeDtypeStruct((num_rows, _CAPACITY + _BLOCK), jnp.float32),
    )
    *result, _, _ = pl.pallas_call(
        functools.partial(_choose_kernel, vocab_size=token_counts.shape[1], masked=masks is not None, threaded=not interpret),
        grid=(num_rows,),
        in_specs=[pl.no_block_spec] * len(operands),
        out_specs=(pl.no_block_spec,) * len(outputs),
        out_shape=outputs,
        input_output_aliases={5: 2, 6: 3},
        compiler_params=plt.CompilerParams(num_warps=_NUM_WARPS, num_stages=2),
        interpret=interpret,
        name="choose_tokens",
    )(*operands)
    return TokenChoice(*result)


def _choose_kernel(
    logits_ref, ints_ref, floats_ref, keys_ref, bias_ref, counts_ref, last_ref, *refs, vocab_size: int, masked: bool, threaded: bool
):
    masks_ref = refs[0] if masked else None
    tokens_ref, stats_ref, counts_out_ref, last_out_ref, *scratch_refs = refs[masked:]
    row = pl.program_id(0)
    flags, slot = ints_ref[row, Column.FLAGS], ints_ref[row, Column.SLOT]
    logits = _Row(logits_ref, ints_ref, floats_ref, bias_ref, counts_ref, last_ref, masks_ref, vocab_size)
    best, token, lanes = logits.largest()
    temperature = floats_ref[row, Column.TEMPERATURE]
    draws, wants_logprobs = temperature > 0, flags & Flag.LOGPROBS != 0
    inverse_temperature = jnp.where(draws, 1 / jnp.where(draws, temperature, 1.0), 1.0)
    stats_ref[row, 0], stats_ref[row, 1] = best, inverse_temperature
    tokens_ref[row] = token

    @pl.when(draws | wants_logprobs)
    def _():
        everything = _Distances(logits, best, inverse_temperature, scratch_refs, threaded)
        options = _Options.read(row, ints_ref, floats_ref, wants_logprobs)
        kept, truncation = _truncate(everything, (best - lanes) * inverse_temperature, options)
        stats_ref[row, 2], stats_ref[row, 3], stats_ref[row, 4] = truncation.bound, truncation.mean, truncation.typical_bound
        stats_ref[row, 5] = jnp.log(truncation.mass)

        @pl.when(draws)
        def _():
            tokens_ref[row] = _draw(kept, truncation, (keys_ref[row, 0], keys_ref[row, 1]), token)

    @pl.when(flags & Flag.SAMPLES != 0)
    def _():
        chosen = tokens_ref[row]
        last_out_ref[slot, 0] = chosen

        @pl.when(flags & Flag.PENALTIES != 0)
        def _():
            counts_out_ref[slot, chosen] += 1


class _Row:
    """This program's logits, adjusted as they are read."""

    def __init__(self, logits_ref, ints_ref, floats_ref, bias_ref, counts_ref, last_ref, masks_ref, vocab_size: int):
        self._logits_ref, self._bias_ref, self._counts_ref, self._masks_ref = logits_ref, bias_ref, counts_ref, masks_ref
        self.vocab_size = vocab_size
        self.row = row = pl.program_id(0)
        self._slot, self._flags = ints_ref[row, Column.SLOT], ints_ref[row, Column.FLAGS]
        self._repetition, self._presence = floats_ref[row, Column.REPETITION], floats_ref[row, Column.PRESENCE]
        self._frequency = floats_ref[row, Column.FREQUENCY]
        self._green_share, self._green_bias = floats_ref[row, Column.GREEN_SHARE], floats_ref[row, Column.GREEN_BIAS]
        previous = ints_ref[row, Column.PREVIOUS]
        self._previous = jnp.where(previous < 0, last_ref[self._slot, 0], previous)

    def read(self, i):
        """Token ids [_BLOCK] of block i, and their logits; -inf behind the vocabulary."""
        place = pl.ds(i * _BLOCK, _BLOCK)
        token = i * _BLOCK + jnp.arange(_BLOCK, dtype=jnp.int32)
        inside = token < self.vocab_size
        value = plt.load(self._logits_ref.at[self.row, place], mask=inside, other=-jnp.inf)

        def adjust(value):
            has_bias, bans, penalized = (self._flags & flag != 0 for flag in (Flag.BIAS, Flag.BANS, Flag.PENALTIES))
            bias = plt.load(self._bias_ref.at[self._slot, place], mask=inside & has_bias, other=0.0)
            counts = plt.load(self._counts_ref.at[self._slot, place], mask=inside, other=0)
            green = is_green(self._previous[None], token, self._green_share[None]).reshape(_BLOCK)
            bias += jnp.where(green & (self._flags & Flag.WATERMARK != 0), self._green_bias, 0.0)
            return adjust_logits(value, bias, counts, bans, penalized, self._repetition, self._presence, self._frequency)

        value = lax.cond(self._flags & ADJUSTS != 0, adjust, lambda value: value, value)
        if self._masks_ref is not None:
            words = plt.load(self._masks_ref.at[self.row, token // 32], mask=inside, other=jnp.uint32(0))
            allowed = (words >> (token % 32).astype(jnp.uint32)) & jnp.uint32(1)
            value = jnp.where(allowed != 0, value, -jnp.inf)
        return token, value

    def largest(self):
        """The largest logit, its lowest token id, and the largest logit of each lane [_BLOCK]."""

        def block(i, carry):
            values, tokens = carry
            token, value = self.read(i)
            return jnp.where(value > values, value, values), jnp.where(value > values, token, tokens)

        nothing = jnp.full((_BLOCK,), -jnp.inf, jnp.float32), jnp.arange(_BLOCK, dtype=jnp.int32)
        values, tokens = lax.fori_loop(0, pl.cdiv(self.vocab_size, _BLOCK), block, nothing)
        best = jnp.max(values)
        return best, _lowest(values == best, tokens), values


class _Distances:
    """Tokens of a row by their distances, (best logit - logit) / temperature: a token's probability is exp(-distance) / mass.

    Either the whole vocabulary, or the `count` tokens that `gather` wrote to the scratch row.
    """

    def __init__(self, logits: _Row, best, inverse_temperature, scratch_refs, threaded: bool, count=None):
        self._logits, self._best, self._inverse_temperature, self._scratch_refs = logits, best, inverse_temperature, scratch_refs
        self._threaded = threaded
        self._count = count
        num_blocks = pl.cdiv(logits.vocab_size, _BLOCK)
        self._num_blocks = num_blocks if count is None else 1 + (count == 0).astype(jnp.int32) * (num_blocks - 1)

    def _read(self, i):
        """Token ids [_BLOCK] of block i, and their distances; inf where there is none."""

        def whole():
            token, value = self._logits.read(i)
            return token, jnp.where(token < self._logits.vocab_size, (self._best - value) * self._inverse_temperature, jnp.inf)

        count = self._count
        if count is None:
            return whole()

        def gathered():
            row, place = self._logits.row, pl.ds(0, _BLOCK)
            present = jnp.arange(_BLOCK, dtype=jnp.int32) < count
            token = plt.load(self._scratch_refs[0].at[row, place], mask=present, other=0)
            return token, plt.load(self._scratch_refs[1].at[row, place], mask=present, other=jnp.inf)

        return lax.cond(count == 0, whole, gathered)

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
        row = self._logits.row

        def write(count, token, distance):
            near = distance <= bound
            number = jnp.sum(near.astype(jnp.int32))

            @pl.when(number > 0)
            def _():
                elsewhere = _CAPACITY + jnp.arange(_BLOCK, dtype=jnp.int32)  # interpreted, a masked store writes what was there
                place = jnp.where(near, count + jnp.cumsum(near.astype(jnp.int32)) - 1, elsewhere)
                for ref, values in zip(self._scratch_refs, (token, distance), strict=True):
                    plt.store(ref.at[row, place], values, mask=near)

            return count + number

        count = self.fold(write, jnp.int32(0))
        if self._threaded:
            plt.debug_barrier()  # what a thread wrote others read
        return count

    def only(self, count):
        """The first `count` tokens of the scratch row; all of the vocabulary for 0."""
        return _Distances(self._logits, self._best, self._inverse_temperature, self._scratch_refs, self._threaded, count)


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


class _Options(NamedTuple):
    """How a row truncates, and whether it wants log probabilities; all scalars."""

    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    typical_p: jax.Array
    wants_logprobs: jax.Array

    @classmethod
    def read(cls, row, ints_ref, floats_ref, wants_logprobs) -> "_Options":
        floats = (floats_ref[row, column] for column in (Column.TOP_P, Column.MIN_P, Column.TYPICAL_P))
        top_p, min_p, typical_p = floats
        return cls(ints_ref[row, Column.TOP_K], top_p, min_p, typical_p, wants_logprobs)


class _Truncation(NamedTuple):
    """What a row keeps: tokens within bound and typical_bound (see runner.distribution).

    Attributes:
        mass: sum of exp(-distance) over the tokens within the bounds; 1 where nobody asks.
        top_mass: a winner must have less mass of likelier tokens than this; inf where the bounds see to it.
    """

    bound: jax.Array
    mean: jax.Array
    typical_bound: jax.Array
    mass: jax.Array
    top_mass: jax.Array

    def keeps(self, distance):
        return (distance <= self.bound) & (jnp.abs(distance - self.mean) <= self.typical_bound)


def _truncate(everything: _Distances, lanes, options: _Options) -> tuple[_Distances, _Truncation]:
    """The tokens among which a row draws, and what of them it keeps."""
    top_k, top_p, min_p, typical_p, wants_logprobs = options
    has_top_k, has_top_p, has_typical = top_k > 0, top_p < 1, typical_p < 1
    truncates = has_top_k | has_top_p | has_typical
    nothing = (top_k * 0).astype(jnp.float32)  # no literal: Pallas-Triton hands none out of a branch
    one, infinity = nothing + 1, nothing + jnp.inf
    widest = jnp.where(min_p > 0, -jnp.log(jnp.where(min_p > 0, min_p, 1.0)), infinity)

    def nearest():
        """Mass of all tokens within min_p, and how many tokens to gather, if they are enough."""
        bound = _nearest_bound(lanes, jnp.where(has_top_k, top_k, _NEAREST))
        mass, near_mass, number = everything.sums(
            lambda d: jnp.where(d <= widest, jnp.exp(-d), 0.0),
            lambda d: jnp.where(d <= jnp.minimum(bound, widest), jnp.exp(-d), 0.0),
            lambda d: jnp.where(d <= bound, 1.0, 0.0),
        )
        # A little more than top_p: the sums are not added up in the order in which the threshold's are.
        enough = has_top_k | (has_top_p & (near_mass >= jnp.minimum(top_p * 1.0001, one) * mass) & (near_mass < mass)) | (widest <= bound)
        return mass, bound, truncates & enough & (number <= _CAPACITY)

    mass, bound, is_enough = lax.cond(truncates | wants_logprobs, nearest, lambda: (one, infinity, has_top_k & (top_k < 0)))
    count = lax.cond(is_enough, lambda: everything.gather(bound), lambda: top_k * 0)
    tokens = everything.only(count)

    def by_thresholds():
        """Three times the same: top_k counts, top_p and typical_p weigh, each among what the one before keeps."""

        def stage(i, carry):
            bound, mean, typical_bound, mass = carry
            wanted = jnp.where(i == 0, has_top_k, jnp.where(i == 1, has_top_p, has_typical))
            share = jnp.where(i == 1, top_p, typical_p)

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

        return (*lax.fori_loop(0, 3, stage, (widest, nothing, infinity, mass)), infinity)

    def by_check():
        return widest, nothing, infinity, mass, jnp.where(has_top_p, top_p * mass, infinity)

    needs_thresholds = truncates & (is_enough | has_top_k | has_typical | wants_logprobs)
    return tokens, _Truncation(*lax.cond(needs_thresholds, by_thresholds, by_check))


def _draw(tokens: _Distances, truncation: _Truncation, key, most_likely):
    """The token with the largest probability / noise among those kept; the most likely one if none is (broken logits)."""

    def race(limit):
        """Winner and its distance among the kept tokens within the limit; -1 where there is none."""

        def run(carry, token, distance):
            scores, winners, reached = carry
            noise = exponential_noise((key[0][None], key[1][None]), token).reshape(_BLOCK)
            kept = truncation.keeps(distance) & (distance <= limit) & (distance < jnp.inf)
            score = jnp.where(kept, jnp.exp(-distance) / noise, -1.0)
            wins = (score > scores) | ((score == scores) & (token < winners))
            return jnp.where(wins, score, scores), jnp.where(wins, token, winners), jnp.where(wins, distance, reached)

        lane = jnp.arange(_BLOCK, dtype=jnp.int32)
        scores, winners, reached = tokens.fold(run, (jnp.full((_BLOCK,), -1.0, jnp.float32), lane, jnp.zeros((_BLOCK,), jnp.float32)))
        best = jnp.max(scores)
        winner = _lowest(scores == best, winners)
        return jnp.where(best >= 0, winner, -1), jnp.max(jnp.where((scores == best) & (winners == winner), reached, 0.0))

    def round(carry):
        limit, _, _ = carry
        winner, distance = race(limit)

        def likelier():
            return tokens.sums(lambda d: jnp.where((d < distance) & (d <= truncation.bound), jnp.exp(-d), 0.0))[0]

        unchecked = (truncation.top_mass == jnp.inf) | (winner < 0)
        mass = lax.cond(unchecked, lambda: jnp.minimum(distance, 0.0) - 1, likelier)  # not a literal, see _truncate
        below = lax.bitcast_convert_type(lax.bitcast_convert_type(distance, jnp.int32) - 1, jnp.float32)
        done = (mass < truncation.top_mass) | (winner < 0) | (distance <= 0)
        return jnp.where(done, limit, below), jnp.where(winner < 0, most_likely, winner), done

    start = jnp.float32(jnp.inf), jnp.int32(0), jnp.bool_(False)
    return lax.while_loop(lambda carry: ~carry[2], round, start)[1]


def _lowest(where, tokens):
    """Lowest token id where a condition holds."""
    return -jnp.max(jnp.where(where, -tokens, jnp.int32(-(2**31) + 1)))
