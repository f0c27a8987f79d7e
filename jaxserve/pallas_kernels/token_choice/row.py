"""One row of logits as the kernels of this folder read it, and what becomes of the token that it chooses."""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jaxserve.pallas_kernels.noise import exponential, is_green, uniform_noise
from jaxserve.pallas_kernels.token_options import ADJUSTS, Column, Flag, adjust_logits

_A_LITTLE_LESS = 1 - 1e-5  # more than all roundings of a score


class Row:
    """This program's options, and its logits, adjusted as they are read.

    Args:
        shared_refs: the operands that `choose_tokens` gives both kernels.
        counts_ref, last_ref: the state by slot.
        vocab_size: V; of a shard, those that it has, which may only be known on the device.
        block: tokens read at once.
        first: of a shard, the token id with which its logits and counts begin; token ids in here begin with 0.
    """

    def __init__(self, shared_refs, counts_ref, last_ref, vocab_size, block: int, first=None):
        self._logits_ref, ints_ref, floats_ref, keys_ref, self._bias_ref = shared_refs
        self._counts_ref, self._first = counts_ref, first
        self.vocab_size, self.block, self.num_blocks = vocab_size, block, pl.cdiv(vocab_size, block)
        self.number = row = pl.program_id(0)
        self.slot, self.flags, self.top_k = (ints_ref[row, column] for column in (Column.SLOT, Column.FLAGS, Column.TOP_K))
        self.temperature, self.top_p, self.min_p, self.typical_p = (
            floats_ref[row, column] for column in (Column.TEMPERATURE, Column.TOP_P, Column.MIN_P, Column.TYPICAL_P)
        )
        self._repetition, self._presence = floats_ref[row, Column.REPETITION], floats_ref[row, Column.PRESENCE]
        self._frequency = floats_ref[row, Column.FREQUENCY]
        self._green_share, self._green_bias = floats_ref[row, Column.GREEN_SHARE], floats_ref[row, Column.GREEN_BIAS]
        self._key = keys_ref[row, 0], keys_ref[row, 1]
        previous = ints_ref[row, Column.PREVIOUS]
        self._previous = jnp.where(previous < 0, last_ref[self.slot, 0], previous)
        self.draws = self.temperature > 0
        self.inverse_temperature = jnp.where(self.draws, 1 / jnp.where(self.draws, self.temperature, 1.0), 1.0)
        self.wants_logprobs = self.flags & Flag.LOGPROBS != 0
        # Which kernel's row it is.
        self.needs_truncation = self.wants_logprobs | (self.draws & ((self.top_k > 0) | (self.typical_p < 1)))

    @property
    def needs_whole(self):
        """Whether one shard of the vocabulary must see all of it, as runner.sampling_rows has it."""
        return self.needs_truncation | (self.draws & (self.top_p < 1))

    @property
    def widest(self):
        """The distance beyond which min_p drops tokens."""
        return jnp.where(self.min_p > 0, -jnp.log(jnp.where(self.min_p > 0, self.min_p, 1.0)), jnp.inf)

    def fold(self, function, start):
        """function(carry, token ids [block], adjusted logits [block]) over all blocks; behind the vocabulary logits are -inf.

        A block is asked for before the one before it is worked on.
        """

        def load(i):
            return plt.load(self._logits_ref.at[self.number, self._place(i)], mask=self._tokens(i) < self.vocab_size, other=-jnp.inf)

        def run(i, carry):
            value, carry = carry
            following = load(i + 1)
            return following, function(carry, self._tokens(i), self._adjusted(i, value))

        return lax.fori_loop(0, self.num_blocks, run, (load(0), start))[1]

    def write(self, adjusted_ref):
        """Write the adjusted logits down."""

        def store(carry, token, value):
            plt.store(adjusted_ref.at[self.number, token], value, mask=token < self.vocab_size)
            return carry

        self.fold(store, self.top_k * 0)

    def fold_distances(self, best, function, start):
        """function(carry, token ids [block], distances [block]) over all blocks: from the best logit, over the temperature.

        Behind the vocabulary they are inf.
        """

        def run(carry, token, value):
            return function(carry, token, jnp.where(token < self.vocab_size, (best - value) * self.inverse_temperature, jnp.inf))

        return self.fold(run, start)

    def _place(self, i):
        return pl.ds(i * self.block, self.block)

    def _tokens(self, i):
        return i * self.block + jnp.arange(self.block, dtype=jnp.int32)

    def _of_all(self, token):
        """The ids that tokens have in the whole vocabulary."""
        return token if self._first is None else token + self._first

    def _adjusted(self, i, value):
        token, place = self._tokens(i), self._place(i)
        inside = token < self.vocab_size

        def adjust(value):
            has_bias, bans, penalized = (self.flags & flag != 0 for flag in (Flag.BIAS, Flag.BANS, Flag.PENALTIES))
            bias = plt.load(self._bias_ref.at[self.slot, place], mask=inside & has_bias, other=0.0)
            counts = plt.load(self._counts_ref.at[self.slot, place], mask=inside, other=0)
            green = is_green(self._previous[None], self._of_all(token), self._green_share[None]).reshape(self.block)
            bias += jnp.where(green & (self.flags & Flag.WATERMARK != 0), self._green_bias, 0.0)
            return adjust_logits(value, bias, counts, bans, penalized, self._repetition, self._presence, self._frequency)

        return lax.cond(self.flags & ADJUSTS != 0, adjust, lambda value: value, value)

    def race(self, fold, keeps):
        """The token with the largest probability / noise, whose noise is standard exponential: so it is drawn by its probability.

        Args:
            fold: of distances, as fold_distances.
            keeps: a function of distances [block]: which tokens take part.

        Returns:
            The largest probability / noise; its token, the lowest of equals, -1 if none takes part; its distance; the sum of
            exp(-distance) over those that take part.
        """

        def run(carry, token, distance):
            highest, winner, reached, mass = carry
            weight = jnp.where(keeps(distance) & (distance < jnp.inf), jnp.exp(-distance), -1.0)
            uniform = uniform_noise((self._key[0][None], self._key[1][None]), self._of_all(token)).reshape(self.block)

            def improve():
                score = jnp.where(weight >= 0, weight / exponential(uniform), -1.0)
                top = jnp.max(score)
                first = lowest(score == top, token)
                at = jnp.max(jnp.where((score == top) & (token == first), distance, 0.0))
                wins = top > highest  # tokens come in rising order
                return jnp.where(wins, top, highest), jnp.where(wins, first, winner), jnp.where(wins, at, reached)

            # The exponential is never less than the uniform that it is made of, so few blocks need its logarithm.
            hopeful = jnp.max((weight > highest * uniform * _A_LITTLE_LESS).astype(jnp.int32)) > 0
            best = lax.cond(hopeful, improve, lambda: (highest, winner, reached))
            return *best, mass + jnp.maximum(weight, 0.0)

        nothing = self.temperature * 0
        start = nothing - 1, self.top_k * 0 - 1, nothing, jnp.zeros((self.block,), jnp.float32)
        highest, winner, reached, mass = fold(run, start)
        return highest, winner, reached, jnp.sum(mass)

    def largest(self):
        """The largest logit, its lowest token id, and the largest logit of each lane [block]."""

        def add(carry, token, value):
            values, tokens = carry
            return jnp.where(value > values, value, values), jnp.where(value > values, token, tokens)

        nothing = jnp.full((self.block,), -jnp.inf, jnp.float32), jnp.arange(self.block, dtype=jnp.int32)
        values, tokens = self.fold(add, nothing)
        best = jnp.max(values)
        return best, lowest(values == best, tokens), values

    def keep(self, token, tokens_ref, counts_ref, last_ref):
        """Hand out the token, and note it in the state if the row samples."""
        tokens_ref[self.number] = token

        @pl.when(self.flags & Flag.SAMPLES != 0)
        def _():
            last_ref[self.slot, 0] = token

            @pl.when(self.flags & Flag.PENALTIES != 0)
            def _():
                counts_ref[self.slot, token] += 1


def lowest(where, tokens):
    """Lowest token id where a condition holds."""
    return -jnp.max(jnp.where(where, -tokens, jnp.int32(-(2**31) + 1)))
