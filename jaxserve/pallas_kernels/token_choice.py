"""One token a row of logits, chosen by one kernel on NVIDIA GPUs from sm_80 on, in Pallas-Triton.

A program is a row, and a row runs only what it asks for: nothing of it needs the host, where XLA's conditionals and loops would bring
their predicates to the host and end the CUDA graph.

**Truncation without thresholds.** The noise of a token depends on nothing but (seed, position, token id), so the winner of the race among
the kept tokens is also the winner among any superset of them that it wins. So the race runs over all tokens; the winner is kept if the
mass (top_p) and the number (top_k) of the likelier tokens are below what the row asks for; otherwise it and all that is not likelier drop
out, and the race is run again. Mostly one round does (rejection sampling as in FlashInfer, arXiv 2501.01005, made deterministic).

**Truncation with thresholds**, where more than the winner is asked: typical_p, top_p after top_k, and log probabilities. A search over the
bit patterns of non-negative floats (their order as integers is their order as floats) tries 15 values in each pass over the row: 8 passes.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jaxserve.pallas_kernels.noise import exponential_noise
from jaxserve.pallas_kernels.token_options import Column, Flag, adjust_logits

_INFINITY_BITS = 0x7F800000
_BLOCK = 4096  # tokens read at once
_SEARCH_BLOCK = 512
_WAYS = 16
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
        columns: int32 [R, 13], see Column.
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
    )
    result = pl.pallas_call(
        functools.partial(_choose_kernel, vocab_size=token_counts.shape[1], masked=masks is not None),
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


def _choose_kernel(logits_ref, ints_ref, floats_ref, keys_ref, bias_ref, counts_ref, last_ref, *refs, vocab_size: int, masked: bool):
    del last_ref  # the same memory as last_out_ref
    masks_ref = refs[0] if masked else None
    tokens_ref, stats_ref, counts_out_ref, last_out_ref = refs[masked:]
    row = pl.program_id(0)
    flags, slot = ints_ref[row, Column.FLAGS], ints_ref[row, Column.SLOT]
    logits = _Row(logits_ref, ints_ref, floats_ref, bias_ref, counts_ref, masks_ref, vocab_size)
    best, token = logits.largest()
    temperature = floats_ref[row, Column.TEMPERATURE]
    draws, wants_logprobs = temperature > 0, flags & Flag.LOGPROBS != 0
    inverse_temperature = jnp.where(draws, 1 / jnp.where(draws, temperature, 1.0), 1.0)
    stats_ref[row, 0], stats_ref[row, 1] = best, inverse_temperature

    @pl.when(draws | wants_logprobs)
    def _():
        distances = _Distances(logits, best, inverse_temperature)
        truncation = _truncate(distances, ints_ref[row, Column.TOP_K], floats_ref, row, wants_logprobs)
        stats_ref[row, 2], stats_ref[row, 3], stats_ref[row, 4] = truncation.bound, truncation.mean, truncation.typical_bound
        stats_ref[row, 5] = jnp.log(truncation.mass)
        tokens_ref[row] = token

        @pl.when(draws)
        def _():
            key = keys_ref[row, 0], keys_ref[row, 1]
            tokens_ref[row] = _draw(distances, truncation, key, token)

    @pl.when(~(draws | wants_logprobs))
    def _():
        tokens_ref[row] = token

    @pl.when(flags & Flag.SAMPLES != 0)
    def _():
        chosen = tokens_ref[row]
        last_out_ref[slot, 0] = chosen

        @pl.when(flags & Flag.PENALTIES != 0)
        def _():
            counts_out_ref[slot, chosen] += 1


class _Row:
    """This program's logits, adjusted as they are read."""

    def __init__(self, logits_ref, ints_ref, floats_ref, bias_ref, counts_ref, masks_ref, vocab_size: int):
        self._logits_ref, self._bias_ref, self._counts_ref, self._masks_ref = logits_ref, bias_ref, counts_ref, masks_ref
        self.vocab_size = vocab_size
        self._row = row = pl.program_id(0)
        self._slot, self._flags = ints_ref[row, Column.SLOT], ints_ref[row, Column.FLAGS]
        self._repetition, self._presence = floats_ref[row, Column.REPETITION], floats_ref[row, Column.PRESENCE]
        self._frequency = floats_ref[row, Column.FREQUENCY]

    def read(self, i, size: int):
        """Token ids [size] of block i, and their logits; -inf behind the vocabulary."""
        place = pl.ds(i * size, size)
        token = i * size + jnp.arange(size, dtype=jnp.int32)
        inside = token < self.vocab_size
        value = plt.load(self._logits_ref.at[self._row, place], mask=inside, other=-jnp.inf)

        def adjust(value):
            has_bias, bans, penalized = (self._flags & flag != 0 for flag in (Flag.BIAS, Flag.BANS, Flag.PENALTIES))
            bias = plt.load(self._bias_ref.at[self._slot, place], mask=inside & has_bias, other=0.0)
            counts = plt.load(self._counts_ref.at[self._slot, place], mask=inside, other=0)
            return adjust_logits(value, bias, counts, bans, penalized, self._repetition, self._presence, self._frequency)

        value = lax.cond(self._flags & (Flag.BIAS | Flag.BANS | Flag.PENALTIES) != 0, adjust, lambda value: value, value)
        if self._masks_ref is not None:
            words = plt.load(self._masks_ref.at[self._row, token // 32], mask=inside, other=jnp.uint32(0))
            allowed = (words >> (token % 32).astype(jnp.uint32)) & jnp.uint32(1)
            value = jnp.where(allowed != 0, value, -jnp.inf)
        return token, value

    def largest(self):
        """The largest logit and its lowest token id."""

        def block(i, carry):
            values, tokens = carry
            token, value = self.read(i, _BLOCK)
            return jnp.where(value > values, value, values), jnp.where(value > values, token, tokens)

        nothing = jnp.full((_BLOCK,), -jnp.inf, jnp.float32), jnp.arange(_BLOCK, dtype=jnp.int32)
        values, tokens = lax.fori_loop(0, pl.cdiv(self.vocab_size, _BLOCK), block, nothing)
        best = jnp.max(values)
        return best, _lowest(values == best, tokens)


class _Distances:
    """A row's logits as distances, (best logit - logit) / temperature; a token's probability is exp(-distance) / mass."""

    def __init__(self, logits: _Row, best, inverse_temperature):
        self.logits, self.best, self.inverse_temperature = logits, best, inverse_temperature

    def read(self, i, size: int):
        """Token ids [size] of block i, and their distances; inf behind the vocabulary."""
        token, value = self.logits.read(i, size)
        return token, jnp.where(token < self.logits.vocab_size, (self.best - value) * self.inverse_temperature, jnp.inf)

    def sums(self, *terms):
        """For each term, a function of distances [N], its sum over the row."""

        def block(i, totals):
            _, distance = self.read(i, _BLOCK)
            return tuple(total + term(distance) for total, term in zip(totals, terms, strict=True))

        nothing = (jnp.zeros((_BLOCK,), jnp.float32),) * len(terms)
        totals = lax.fori_loop(0, pl.cdiv(self.logits.vocab_size, _BLOCK), block, nothing)
        return tuple(jnp.sum(total) for total in totals)

    def covering(self, key, weight, target):
        """Smallest of a row's keys at or below which the weights sum to at least the target; inf if they never do.

        Args:
            key, weight: functions of distances [N] to non-negative float32 [N].
        """
        blocks = pl.cdiv(self.logits.vocab_size, _SEARCH_BLOCK)
        part = jnp.arange(_WAYS, dtype=jnp.int32) + 1

        def narrow(bounds):
            low, high = bounds  # low does not cover the target, high does or is infinite
            span = high - low
            tried = jnp.minimum(low + span // _WAYS * part + span % _WAYS * part // _WAYS, high)

            def block(i, totals):
                _, distance = self.read(i, _SEARCH_BLOCK)
                bits, weights = lax.bitcast_convert_type(key(distance), jnp.int32), weight(distance)
                return totals + jnp.where(bits[:, None] <= tried[None, :], weights[:, None], 0.0)

            totals = lax.fori_loop(0, blocks, block, jnp.zeros((_SEARCH_BLOCK, _WAYS), jnp.float32))
            enough = (jnp.sum(totals, axis=0) >= target) | (tried == high)
            return jnp.max(jnp.where(enough, low, tried)), -jnp.max(jnp.where(enough, -tried, -high))

        _, high = lax.while_loop(lambda bounds: bounds[1] - bounds[0] > 1, narrow, (jnp.int32(-1), jnp.int32(_INFINITY_BITS)))
        return lax.bitcast_convert_type(high, jnp.float32)


class _Truncation(NamedTuple):
    """What a row keeps: tokens within bound and typical_bound (see runner.distribution), and, of those, a winner must also pass the checks.

    Attributes:
        mass: sum of exp(-distance) over the tokens within the bounds; 1 where nobody asks.
        top_k: fewer likelier tokens than this; a huge number where the bound sees to it.
        top_mass: less mass of likelier tokens than this; inf where the bound sees to it.
    """

    bound: jax.Array
    mean: jax.Array
    typical_bound: jax.Array
    mass: jax.Array
    top_k: jax.Array
    top_mass: jax.Array

    def keeps(self, distance):
        return (distance <= self.bound) & (jnp.abs(distance - self.mean) <= self.typical_bound)


def _truncate(distances: _Distances, top_k, floats_ref, row, wants_logprobs) -> _Truncation:
    min_p, top_p = floats_ref[row, Column.MIN_P], floats_ref[row, Column.TOP_P]
    typical_p = floats_ref[row, Column.TYPICAL_P]
    has_top_k, has_top_p, has_typical = top_k > 0, top_p < 1, typical_p < 1
    nothing = (row * 0).astype(jnp.float32)  # no literal: Pallas-Triton hands none out of a branch
    one, infinity, many = nothing + 1, nothing + jnp.inf, nothing + 1e30
    widest = jnp.where(min_p > 0, -jnp.log(jnp.where(min_p > 0, min_p, 1.0)), infinity)

    def mass_within(bound):
        return distances.sums(lambda d: jnp.where(d <= bound, jnp.exp(-d), 0.0))[0]

    def by_thresholds():
        """Three times the same: top_k counts, top_p and typical_p weigh, each among what the one before keeps."""

        def stage(i, carry):
            bound, mean, typical_bound, mass = carry
            wanted = jnp.where(i == 0, has_top_k, jnp.where(i == 1, has_top_p, has_typical))
            share = jnp.where(i == 1, top_p, typical_p)

            def apply():
                kept_mass, moment = distances.sums(
                    lambda d: jnp.where(d <= bound, jnp.exp(-d), 0.0),
                    lambda d: jnp.where((d <= bound) & (d < 1e30), jnp.exp(-d) * jnp.minimum(d, 1e30), 0.0),
                )
                middle = jnp.where(i == 2, moment / kept_mass, 0.0)

                def weight(d):
                    kept = jnp.where(d <= bound, jnp.where(i == 0, 1.0, jnp.exp(-d)), 0.0)
                    return jnp.where((i == 2) & (d >= 1e30), 0.0, kept)

                target = jnp.where(i == 0, top_k.astype(jnp.float32), share * kept_mass)
                found = distances.covering(lambda d: jnp.abs(d - middle), weight, target)
                new_bound = jnp.where(i == 2, bound, jnp.minimum(bound, found))
                new_typical = jnp.where(i == 2, found, infinity)
                (new_mass,) = distances.sums(lambda d: jnp.where((d <= new_bound) & (jnp.abs(d - middle) <= new_typical), jnp.exp(-d), 0.0))
                return new_bound, middle, new_typical, new_mass

            return lax.cond(wanted, apply, lambda: (bound, mean, typical_bound, mass))

        return (*lax.fori_loop(0, 3, stage, (widest, nothing, infinity, one)), many, infinity)

    def by_checks():
        mass = lax.cond(has_top_p | wants_logprobs, lambda: mass_within(widest), lambda: one)
        number = jnp.where(has_top_k, top_k.astype(jnp.float32), many)
        return widest, nothing, infinity, mass, number, jnp.where(has_top_p, top_p * mass, infinity)

    needs_thresholds = has_typical | (has_top_k & has_top_p) | (wants_logprobs & (has_top_k | has_top_p))
    return _Truncation(*lax.cond(needs_thresholds, by_thresholds, by_checks))


def _draw(distances: _Distances, truncation: _Truncation, key, most_likely):
    """The token with the largest probability / noise among those kept; the most likely one if none is (broken logits)."""
    vocab_size = distances.logits.vocab_size
    unchecked = (truncation.top_k >= vocab_size) & (truncation.top_mass == jnp.inf)

    def race(limit):
        """Winner and its distance among the kept tokens within the limit; -1 where there is none."""

        def block(i, carry):
            scores, winners, reached = carry
            token, distance = distances.read(i, _BLOCK)
            keys = key[0][None], key[1][None]
            noise = exponential_noise(keys, token).reshape(_BLOCK)
            kept = truncation.keeps(distance) & (distance <= limit) & (token < vocab_size)
            score = jnp.where(kept, jnp.exp(-distance) / noise, -1.0)
            wins = score > scores
            return jnp.where(wins, score, scores), jnp.where(wins, token, winners), jnp.where(wins, distance, reached)

        nothing = jnp.full((_BLOCK,), -1.0, jnp.float32), jnp.arange(_BLOCK, dtype=jnp.int32), jnp.zeros((_BLOCK,), jnp.float32)
        scores, winners, reached = lax.fori_loop(0, pl.cdiv(vocab_size, _BLOCK), block, nothing)
        best = jnp.max(scores)
        winner = _lowest(scores == best, winners)
        return jnp.where(best >= 0, winner, -1), jnp.max(jnp.where((scores == best) & (winners == winner), reached, 0.0))

    def round(carry):
        limit, _, _ = carry
        winner, distance = race(limit)

        def likelier():
            return distances.sums(
                lambda d: jnp.where((d < distance) & (d <= truncation.bound), 1.0, 0.0),
                lambda d: jnp.where((d < distance) & (d <= truncation.bound), jnp.exp(-d), 0.0),
            )

        nobody = jnp.minimum(distance, 0.0)  # not a literal, see _truncate
        number, mass = lax.cond(unchecked | (winner < 0), lambda: (nobody, nobody - 1), likelier)
        accepted = (number < truncation.top_k) & (mass < truncation.top_mass)
        below = lax.bitcast_convert_type(lax.bitcast_convert_type(distance, jnp.int32) - 1, jnp.float32)
        done = accepted | (winner < 0) | (distance <= 0)
        return jnp.where(done, limit, below), jnp.where(winner < 0, most_likely, winner), done

    start = jnp.float32(jnp.inf), jnp.int32(0), jnp.bool_(False)
    return lax.while_loop(lambda carry: ~carry[2], round, start)[1]


def _lowest(where, tokens):
    """Lowest token id where a condition holds."""
    return -jnp.max(jnp.where(where, -tokens, jnp.int32(-(2**31) + 1)))
