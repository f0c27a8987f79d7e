"""The sampler of a vocabulary that is cut over the shards of a mesh: sampler.py's functions, traced inside `jax.shard_map`.

Each shard keeps its own range of the logits, and of the counts and biases by slot. What a row asks for is applied there, and noise is a
function of the token id: so of a row that is greedy, or truncates by no more than min_p, each shard tells its largest logit, then the
winner of the race in its range, and the best of these is the whole row's. A row that truncates by more, or wants log probabilities, is
dealt out: one shard sees it whole and does what sampler.py does. The shards take such rows in turns, so none gets the whole vocabulary
of more than its share of them.

Three exchanges choose the tokens: largest logits, the rows dealt out, and winners. Each follows from the one before (exchange.py).
"""

from dataclasses import replace
from typing import Protocol

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels import local_gpu, log_sum_exp
from jaxserve.pallas_kernels.noise import noise_keys
from jaxserve.pallas_kernels.token_options import ADJUSTS, Column, Flag
from jaxserve.request import MAX_TOP_LOGPROBS
from jaxserve.runner import sampler
from jaxserve.runner.distribution import Distribution, whole_distribution
from jaxserve.runner.prompt_scores import score_tokens as score_whole_rows
from jaxserve.runner.sampler import SAMPLED_COLUMNS, pack_columns
from jaxserve.runner.sampling_rows import SamplingRows, neutral_columns, unpack_rows
from jaxserve.runner.sampling_state import SamplingState, make_sampling_state
from jaxserve.runner.vocabulary import VocabularyShards

_NUM_STATS = SAMPLED_COLUMNS - 3


def apply_masks(logits: jax.Array, masks: jax.Array, vocabulary: VocabularyShards) -> jax.Array:
    """As the sampler's, of this shard's logits, float32 [R, width]; masks are of the whole vocabulary."""
    allowed = sampler.unpack_masks(masks, 32 * masks.shape[1])
    return jnp.where(vocabulary.own_range(allowed), logits, -jnp.inf)


def sample(logits: jax.Array, state: SamplingState, columns: jax.Array, vocabulary: VocabularyShards) -> tuple[jax.Array, SamplingState]:
    """As the sampler's.

    Args:
        logits: float32 [R, width], of this shard.
        state: of this shard, its last tokens of all.
        columns: int32 [R, NUM_SAMPLING_COLUMNS], the same on every shard.
        vocabulary: how it is cut.

    Returns:
        What the sampler returns, int32 [R, SAMPLED_COLUMNS], the same on every shard; the shard's state.
    """
    rows, num_rows = unpack_rows(columns), len(columns)
    shard = (_XlaShard if local_gpu() is None else _KernelShard)(logits, state, columns, vocabulary)
    best, most_likely = _best(vocabulary, vocabulary.told(_found(vocabulary, *shard.largest())))
    own = pack_columns(*shard.choose_whole(_dealt_columns(columns, rows, vocabulary), best))
    winners = _found(vocabulary, *shard.race(best))
    told = vocabulary.told(jnp.concatenate([winners.reshape(-1), own.reshape(-1)]))
    of_winners, of_whole = jnp.split(told, [winners.size], axis=1)
    score, winner = _best(vocabulary, of_winners.reshape(-1, *winners.shape))
    whole = vocabulary.all_rows(of_whole.reshape(-1, *own.shape), num_rows)
    # Of broken logits none takes part.
    token_ids = jnp.where(rows.draws & (score >= jnp.float32(0)), winner, most_likely)
    token_ids = jnp.where(rows.needs_whole, whole[:, 0], token_ids)
    sampled = pack_columns(rows.samples, token_ids, sampler.previous_tokens(state, rows), whole[:, 1:])
    return sampled, sampler.remember(state, rows, token_ids, vocabulary.places(token_ids))


def find_logprobs(
    raw: jax.Array, logits: jax.Array, state: SamplingState, columns: jax.Array, sampled: jax.Array, vocabulary: VocabularyShards
) -> jax.Array:
    """As the sampler's: raw and logits float32 [R, width] and the state are of this shard, the rest and the result as there."""
    rows, num_rows = unpack_rows(columns), len(columns)
    token_ids, previous = sampled[:, 1], sampled[:, 2]
    stats = jax.lax.bitcast_convert_type(sampled[:, 3:], jnp.float32)
    distribution = Distribution(*(stats[:, i] for i in range(_NUM_STATS)))
    own = vocabulary.whole_rows(raw, rows.wants_logprobs)[:, : vocabulary.size]
    top_logits, top_ids = sampler.top_tokens(own, MAX_TOP_LOGPROBS)
    chosen = jnp.take_along_axis(own, vocabulary.own_rows(token_ids)[:, None], axis=1)
    log_sum = log_sum_exp(own)[:, None]
    told = vocabulary.told(pack_columns(chosen - log_sum, top_logits - log_sum, top_ids))
    raws, top_ids = jnp.split(vocabulary.all_rows(told, num_rows), [1 + MAX_TOP_LOGPROBS], axis=1)
    ids = jnp.concatenate([token_ids[:, None], top_ids], axis=1)
    places = jnp.minimum(vocabulary.places(ids), jnp.int32(vocabulary.width - 1))
    adjusted = sampler.adjust_at(places, ids, logits, state, rows, previous, token_ids)
    processed = distribution.logprobs(vocabulary.look_up(ids, adjusted))
    return pack_columns(sampled[:, 0], token_ids, raws[:, :1], processed[:, :1], top_ids, raws[:, 1:], processed[:, 1:])


def score_tokens(logits: jax.Array, token_ids: jax.Array, vocabulary: VocabularyShards) -> jax.Array:
    """As prompt_scores', of this shard's logits, float32 [S, width]; each shard scores its turns of the tokens."""
    own = vocabulary.whole_rows(logits)[:, : vocabulary.size]
    scored = score_whole_rows(own, vocabulary.own_rows(token_ids))
    return vocabulary.all_rows(vocabulary.told(scored), len(token_ids))


class _Shard(Protocol):
    """What a shard computes of its range and of the rows that it is dealt."""

    def __init__(self, logits: jax.Array, state: SamplingState, columns: jax.Array, vocabulary: VocabularyShards): ...

    def largest(self) -> tuple[jax.Array, jax.Array]:
        """Largest adjusted logit, float32 [R], and where in the range, int32 [R]."""
        ...

    def race(self, best: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Likewise the largest probability / noise, -1 where none takes part, of rows that sample and are not dealt out; `best`: of all
        shards' logits.
        """
        ...

    def choose_whole(self, columns: jax.Array, best: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Tokens int32 [turns] and stats float32 [turns, 6] of the rows that this shard is dealt, whose columns are given; after `best`."""
        ...


class _KernelShard(_Shard):
    """By kernels; a row costs what it asks for."""

    def __init__(self, logits: jax.Array, state: SamplingState, columns: jax.Array, vocabulary: VocabularyShards):
        # Pallas takes over a second to import: not where there is no GPU.
        from jaxserve.pallas_kernels.token_choice import TokenRange

        self._vocabulary, self._rows = vocabulary, unpack_rows(columns)
        bounds = jnp.stack([vocabulary.first, vocabulary.num_held])
        of_slots = state.token_counts, state.bias, state.last_tokens
        self._range = TokenRange(bounds, logits, columns, _keys(self._rows), *of_slots)
        self._best, self._place, self._adjusted = self._range.largest()

    def largest(self) -> tuple[jax.Array, jax.Array]:
        return self._best, self._place

    def race(self, best: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self._range.race(best)

    def choose_whole(self, columns: jax.Array, best: jax.Array) -> tuple[jax.Array, jax.Array]:
        from jaxserve.pallas_kernels.token_choice import choose_adjusted_tokens

        dealt = self._vocabulary.whole_rows(self._adjusted, self._rows.needs_whole, after=best)
        choice = choose_adjusted_tokens(dealt, columns, _keys(unpack_rows(columns)), self._vocabulary.size)
        return choice.token_ids, choice.stats


class _XlaShard(_Shard):
    """By XLA, whose conditionals cost nothing on a CPU."""

    def __init__(self, logits: jax.Array, state: SamplingState, columns: jax.Array, vocabulary: VocabularyShards):
        self._vocabulary, self._rows = vocabulary, unpack_rows(columns)
        self._held = (jnp.arange(vocabulary.width, dtype=jnp.int32) < vocabulary.num_held)[None, :]
        adjusted = sampler.adjust(logits, vocabulary.token_ids, state, self._rows)
        self._adjusted = jnp.where(self._held, adjusted, -jnp.inf)

    def largest(self) -> tuple[jax.Array, jax.Array]:
        return jnp.max(self._adjusted, axis=1), sampler.first_argmax(self._adjusted)

    def race(self, best: jax.Array) -> tuple[jax.Array, jax.Array]:
        rows = self._rows

        def run() -> tuple[jax.Array, jax.Array]:
            distances = replace(whole_distribution(self._adjusted, rows), best=best).distances(self._adjusted)
            kept = (distances <= -jnp.log(rows.min_p)[:, None]) & self._held
            scores = sampler.race_scores(distances, kept, self._vocabulary.token_ids, rows)
            return jnp.max(scores, axis=1), sampler.first_argmax(scores)

        nothing = jnp.full_like(best, -1), jnp.zeros(best.shape, jnp.int32)
        return jax.lax.cond(jnp.any(rows.draws & ~rows.needs_whole), run, lambda: nothing)

    def choose_whole(self, columns: jax.Array, best: jax.Array) -> tuple[jax.Array, jax.Array]:
        vocab_size = self._vocabulary.size

        def choose() -> tuple[jax.Array, jax.Array]:
            dealt = self._vocabulary.whole_rows(self._adjusted, after=best)[:, :vocab_size]
            token_ids, distribution, _ = sampler.choose_by_xla(dealt, make_sampling_state(1, vocab_size), columns)
            return token_ids, jnp.stack(jax.tree.leaves(distribution), axis=1)

        nothing = jnp.zeros(columns.shape[:1], jnp.int32), jnp.zeros((*columns.shape[:1], _NUM_STATS), jnp.float32)
        return jax.lax.cond(jnp.any(self._rows.needs_whole), choose, lambda: nothing)


def _keys(rows: SamplingRows) -> tuple[jax.Array, jax.Array]:
    return noise_keys(rows.seed_low, rows.seed_high, rows.positions)


def _dealt_columns(columns: jax.Array, rows: SamplingRows, vocabulary: VocabularyShards) -> jax.Array:
    """What the rows that this shard is dealt still ask for: their logits are adjusted, and the state is not here."""
    flags = columns[:, Column.FLAGS] & jnp.int32(~(ADJUSTS | Flag.SAMPLES))
    dealt = columns.at[:, Column.FLAGS].set(flags).at[:, Column.SLOT].set(0)
    dealt = jnp.where(rows.needs_whole[:, None], dealt, neutral_columns()[None, :])
    return vocabulary.own_rows(dealt)


def _found(vocabulary: VocabularyShards, value: jax.Array, place: jax.Array) -> jax.Array:
    """int32 [R, 2], as one shard tells it to the others."""
    return pack_columns(value, place + vocabulary.first)


def _best(vocabulary: VocabularyShards, told: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of int32 [shards, R, 2], the best value of each row and its token id."""
    return vocabulary.best(jax.lax.bitcast_convert_type(told[..., 0], jnp.float32), told[..., 1])
