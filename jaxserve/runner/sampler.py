"""The sampler: logits in, one token a row out, whatever the rows ask for, in one program.

The order of operations is vLLM's: logit bias, bans, penalties (repetition, then presence and frequency), grammar mask; temperature,
min_p, top_k, top_p, typical_p; Gumbel-max. Raw logprobs are of the logits as the model gave them, processed ones of the distribution
that is sampled (for a greedy row: at temperature 1, nothing truncated). Each costly part sits under a `lax.cond` on whether any row
wants it: a greedy batch pays for an argmax.

Ties: the lowest token id wins an argmax; a truncation keeps or drops equal logits together.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.request import MAX_TOP_LOGPROBS
from jaxserve.runner.distribution import Distribution, sum_masses, truncate, whole_distribution
from jaxserve.runner.noise import exponential_noise
from jaxserve.runner.sampling_rows import SamplingRows
from jaxserve.runner.sampling_state import PROMPT_FLAG, SamplingState
from jaxserve.step import StepLogprobs, StepResult

_BLOCK = 128


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SampledTokens:
    """What a step chose. N is MAX_TOP_LOGPROBS; logprob arrays are zero in a batch that wants none.

    Attributes:
        token_ids: int32 [R, 1+K].
        counts: int32 [R], how many of them are valid; 0 where the row does not sample.
        raw, processed: float32 [R, 1+K], log probability of each chosen token.
        top_ids: int32 [R, 1+K, N], most likely tokens by raw log probability, best first.
        top_raw, top_processed: float32 [R, 1+K, N].
    """

    token_ids: jax.Array
    counts: jax.Array
    raw: jax.Array
    processed: jax.Array
    top_ids: jax.Array
    top_raw: jax.Array
    top_processed: jax.Array


def sample(
    logits: jax.Array, state: SamplingState, rows: SamplingRows, masks: jax.Array | None = None
) -> tuple[SampledTokens, SamplingState]:
    """Choose a token for each row. Called inside the step's jit, also within shard_map where every shard does the same.

    Args:
        logits: float32 [R, V] or wider: columns from the state's V on are padding and never chosen.
        state: by slot; donated by the caller.
        rows: what each row asks for.
        masks: uint32 [R, ceil(V / 32)], bit t % 32 of word t // 32 allows token t; None allows all.

    Returns:
        The tokens, and the state with counts and last tokens of the rows that sample.
    """
    vocab_size = state.token_counts.shape[1]
    raw = logits[:, :vocab_size]
    adjusts = jnp.any(rows.has_bias | rows.bans | rows.has_penalties)
    adjusted = jax.lax.cond(adjusts, lambda: _adjust(raw, state, rows), lambda: raw)
    if masks is not None:
        adjusted = jnp.where(unpack_masks(masks, vocab_size), adjusted, -jnp.inf)
    draws, wants_logprobs = jnp.any(rows.temperature > jnp.float32(0)), jnp.any(rows.wants_logprobs)
    distribution = _distribution(adjusted, rows, draws, wants_logprobs)
    token_ids = jax.lax.cond(draws, lambda: _draw(adjusted, distribution, rows), lambda: first_argmax(adjusted))
    return _tokens(raw, adjusted, token_ids, distribution, rows), _remember(state, rows, token_ids)


def unpack_masks(masks: jax.Array, vocab_size: int) -> jax.Array:
    """bool [R, V] from uint32 [R, ceil(V / 32)], lowest bit first."""
    bits = (masks[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)[None, None, :]) & jnp.uint32(1)
    return bits.reshape(masks.shape[0], -1)[:, :vocab_size] != jnp.uint32(0)


def first_argmax(values: jax.Array) -> jax.Array:
    """int32 [R]: lowest index of the largest value of each row of float32 [R, V]; some index if the largest is NaN.

    XLA's own argmax is not vectorised on CPUs (10 times slower); a maximum is. So first the block with the largest one, then it alone.
    """
    rows, size = values.shape
    blocks = _blocks(values)
    block = jnp.argmax(jnp.max(blocks, axis=2), axis=1).astype(jnp.int32)
    chosen = jnp.take_along_axis(blocks, block[:, None, None], axis=1, mode="promise_in_bounds").reshape(rows, _BLOCK)
    place = jnp.argmax(chosen, axis=1).astype(jnp.int32)
    return jnp.minimum(block * jnp.int32(_BLOCK) + place, jnp.int32(size - 1))


def _blocks(values: jax.Array) -> jax.Array:
    """float32 [R, ceil(V / _BLOCK), _BLOCK], filled up with -inf."""
    rows, size = values.shape
    padding = jnp.full((rows, -size % _BLOCK), -jnp.inf, jnp.float32)
    return jnp.concatenate([values, padding], axis=1).reshape(rows, -1, _BLOCK)


def _adjust(raw: jax.Array, state: SamplingState, rows: SamplingRows) -> jax.Array:
    """Bias, bans and penalties of each row's slot: float32 [R, V]."""
    count, vocab_size = raw.shape
    every_row = jnp.arange(count, dtype=jnp.int32)[:, None]
    nowhere = jnp.int32(vocab_size)
    ids = jnp.concatenate(
        [
            jnp.where(rows.has_bias[:, None], state.bias_ids[rows.slots], nowhere),
            jnp.where(rows.bans[:, None], state.ban_ids[rows.slots], nowhere),
        ],
        axis=1,
    )
    values = jnp.concatenate([state.bias_values[rows.slots], jnp.full((count, state.ban_ids.shape[1]), -jnp.inf, jnp.float32)], axis=1)
    adjusted = raw.at[every_row, ids].add(values, mode="drop")

    def penalize() -> jax.Array:
        counts = jnp.where(rows.has_penalties[:, None], state.token_counts[rows.slots], jnp.int32(0))
        outputs = (counts & jnp.int32(PROMPT_FLAG - 1)).astype(jnp.float32)
        repetition = jnp.where(counts != jnp.int32(0), rows.repetition_penalty[:, None], jnp.float32(1))
        penalized = jnp.where(adjusted > jnp.float32(0), adjusted / repetition, adjusted * repetition)
        penalized = penalized - rows.frequency_penalty[:, None] * outputs
        return penalized - jnp.where(outputs > jnp.float32(0), rows.presence_penalty[:, None], jnp.float32(0))

    return jax.lax.cond(jnp.any(rows.has_penalties), penalize, lambda: adjusted)


def _distribution(adjusted: jax.Array, rows: SamplingRows, draws: jax.Array, wants_logprobs: jax.Array) -> Distribution:
    """What each row samples, as far as the batch needs to know: bool scalars say whether any row draws or wants logprobs."""
    truncates = (
        (rows.min_p > jnp.float32(0)) | (rows.top_k > jnp.int32(0)) | (rows.top_p < jnp.float32(1)) | (rows.typical_p < jnp.float32(1))
    )
    truncates_any = jnp.any(truncates)

    def known() -> Distribution:
        whole = whole_distribution(adjusted, rows)
        whole = jax.lax.cond(wants_logprobs | truncates_any, lambda: sum_masses(whole, adjusted), lambda: whole)
        return jax.lax.cond(truncates_any, lambda: truncate(whole, adjusted, rows), lambda: whole)

    def unknown() -> Distribution:
        return Distribution(*[jnp.zeros((adjusted.shape[0],), jnp.float32)] * 6)

    return jax.lax.cond(draws | wants_logprobs, known, unknown)


def _draw(adjusted: jax.Array, distribution: Distribution, rows: SamplingRows) -> jax.Array:
    """Gumbel-max in its exponential form: the token with the largest probability / noise; greedy rows take the nearest."""
    distances = distribution.distances(adjusted)
    noise = exponential_noise(rows.seed_low, rows.seed_high, rows.positions, jnp.arange(adjusted.shape[1], dtype=jnp.int32))
    race = jnp.where(distribution.keeps(distances), jnp.exp(-distances) / noise, jnp.float32(-1))
    greedy = (rows.temperature == jnp.float32(0))[:, None]
    return first_argmax(jnp.where(greedy, -distances, race))


def _tokens(raw: jax.Array, adjusted: jax.Array, token_ids: jax.Array, distribution: Distribution, rows: SamplingRows) -> SampledTokens:
    count = raw.shape[0]

    def logprobs() -> tuple[jax.Array, ...]:
        best = jnp.max(raw, axis=1, keepdims=True)
        log_sum = best + jnp.log(jnp.sum(jnp.exp(raw - best), axis=1, keepdims=True))
        top_logits, top_ids = top_tokens(raw, MAX_TOP_LOGPROBS)
        ids = jnp.concatenate([token_ids[:, None], top_ids], axis=1)
        processed = distribution.logprobs(jnp.take_along_axis(adjusted, ids, axis=1))
        chosen = jnp.take_along_axis(raw, token_ids[:, None], axis=1)
        return (chosen - log_sum)[:, 0], processed[:, 0], top_ids, top_logits - log_sum, processed[:, 1:]

    def nothing() -> tuple[jax.Array, ...]:
        one, many = jnp.zeros((count,), jnp.float32), jnp.zeros((count, MAX_TOP_LOGPROBS), jnp.float32)
        return one, one, jnp.zeros((count, MAX_TOP_LOGPROBS), jnp.int32), many, many

    chosen_raw, chosen_processed, top_ids, top_raw, top_processed = jax.lax.cond(jnp.any(rows.wants_logprobs), logprobs, nothing)
    return SampledTokens(
        token_ids=token_ids[:, None],
        counts=rows.samples.astype(jnp.int32),
        raw=chosen_raw[:, None],
        processed=chosen_processed[:, None],
        top_ids=top_ids[:, None],
        top_raw=top_raw[:, None],
        top_processed=top_processed[:, None],
    )


def top_tokens(logits: jax.Array, number: int) -> tuple[jax.Array, jax.Array]:
    """The largest logits of each row, best first, ties by lowest id.

    The `number` blocks with the largest maxima hold them all, so only those are ranked.

    Args:
        logits: float32 [R, V].
        number: how many; a vocabulary smaller than that is padded with -inf at ids from V on.

    Returns:
        Values float32 [R, number] and ids int32 [R, number].
    """
    rows, vocab_size = logits.shape
    short = max(number * _BLOCK - vocab_size, 0)
    blocks = _blocks(jnp.concatenate([logits, jnp.full((rows, short), -jnp.inf, jnp.float32)], axis=1))
    _, best_blocks = jax.lax.top_k(jnp.max(blocks, axis=2), number)
    best_blocks = jnp.sort(best_blocks, axis=1)
    candidates = jnp.take_along_axis(blocks, best_blocks[:, :, None], axis=1, mode="promise_in_bounds").reshape(rows, number * _BLOCK)
    values, places = jax.lax.top_k(candidates, number)
    block, offset = places // jnp.int32(_BLOCK), places % jnp.int32(_BLOCK)
    return values, jnp.take_along_axis(best_blocks, block, axis=1) * jnp.int32(_BLOCK) + offset


def _remember(state: SamplingState, rows: SamplingRows, token_ids: jax.Array) -> SamplingState:
    """Count and keep the tokens of the rows that sample."""
    nowhere = jnp.int32(state.last_tokens.shape[0])
    slots = jnp.where(rows.samples, rows.slots, nowhere)
    counted = jnp.where(rows.has_penalties, slots, nowhere)
    return replace(
        state,
        token_counts=state.token_counts.at[counted, token_ids].add(jnp.int32(1), mode="drop"),
        last_tokens=state.last_tokens.at[slots].set(token_ids[:, None], mode="drop"),
    )


def pack_sampled(tokens: SampledTokens) -> jax.Array:
    """All of it in one int32 array [R, (1+K) * (3 + 3N) + 1], so that one copy brings it to the host."""
    count = tokens.counts.shape[0]
    columns = [tokens.counts, tokens.token_ids, tokens.raw, tokens.processed, tokens.top_ids, tokens.top_raw, tokens.top_processed]
    return jnp.concatenate([jax.lax.bitcast_convert_type(c, jnp.int32).reshape(count, -1) for c in columns], axis=1)


def unpack_sampled(packed: np.ndarray) -> StepResult:
    """numpy views of what `pack_sampled` packed."""
    count, per_row = packed.shape
    depth = (per_row - 1) // (3 + 3 * MAX_TOP_LOGPROBS)
    widths = [1, *[depth] * 3, *[depth * MAX_TOP_LOGPROBS] * 3]
    ends = np.cumsum(widths)
    counts, token_ids, raw, processed, top_ids, top_raw, top_processed = (
        packed[:, end - w : end] for w, end in zip(widths, ends, strict=True)
    )
    shape = (count, depth, MAX_TOP_LOGPROBS)
    logprobs = StepLogprobs(
        raw=raw.view(np.float32),
        processed=processed.view(np.float32),
        top_ids=top_ids.reshape(shape),
        top_raw=top_raw.view(np.float32).reshape(shape),
        top_processed=top_processed.view(np.float32).reshape(shape),
    )
    return StepResult(token_ids, counts[:, 0], logprobs)
