"""The sampler: logits in, one token a row out, whatever the rows ask for, in one program.

The order of operations is vLLM's: logit bias, bans, penalties (repetition, then presence and frequency), grammar mask; temperature,
min_p, top_k, top_p, typical_p; Gumbel-max. Raw logprobs are of the logits as the model gave them, processed ones of the distribution
that is sampled. Each costly part sits under a `lax.cond` on whether any row wants it: a greedy batch pays for an argmax.

Ties: the lowest token id wins an argmax; a truncation keeps or drops equal logits together.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.request import MAX_TOP_LOGPROBS
from jaxserve.runner.noise import exponential_noise
from jaxserve.runner.sampling_rows import SamplingRows
from jaxserve.runner.sampling_state import PROMPT_FLAG, SamplingState
from jaxserve.runner.thresholds import covering_threshold

_TOP_BLOCK = 128


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


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Distribution:
    """The distribution that each row samples, as bounds on distances from its best logit; every attribute is float32 [R].

    A token's distance is (best - logit) / temperature. It is kept if that is at most `bound` and its information content,
    distance + log_sum, is at most `typical_bound` away from `entropy`.
    """

    best: jax.Array
    temperature: jax.Array
    bound: jax.Array
    log_sum: jax.Array
    entropy: jax.Array
    typical_bound: jax.Array
    log_kept: jax.Array

    def distances(self, logits: jax.Array) -> jax.Array:
        """float32 [R, ...], non-negative, for logits float32 [R, ...]."""
        return (self.best[:, None] - logits) / self.temperature[:, None]

    def keeps(self, distances: jax.Array) -> jax.Array:
        """bool [R, ...], whether truncation keeps tokens at these distances."""
        information = distances + self.log_sum[:, None]
        return (distances <= self.bound[:, None]) & (jnp.abs(information - self.entropy[:, None]) <= self.typical_bound[:, None])

    def logprobs(self, logits: jax.Array) -> jax.Array:
        """float32 [R, ...], -inf where truncation removed the token."""
        distances = self.distances(logits)
        return jnp.where(self.keeps(distances), -distances - self.log_kept[:, None], -jnp.inf)


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
    raw = jnp.where(jnp.isnan(raw), -jnp.inf, jnp.minimum(raw, jnp.finfo(jnp.float32).max))
    adjusts = jnp.any(rows.has_bias | rows.bans | rows.has_penalties)
    adjusted = jax.lax.cond(adjusts, lambda: _adjust(raw, state, rows), lambda: raw)
    if masks is not None:
        adjusted = jnp.where(unpack_masks(masks, vocab_size), adjusted, -jnp.inf)
    token_ids, distribution = jax.lax.cond(
        jnp.any(rows.temperature > jnp.float32(0)), lambda: _draw(adjusted, rows), lambda: _take_best(adjusted, rows)
    )
    return _tokens(raw, adjusted, token_ids, distribution, rows), _remember(state, rows, token_ids)


def unpack_masks(masks: jax.Array, vocab_size: int) -> jax.Array:
    """bool [R, V] from uint32 [R, ceil(V / 32)], lowest bit first."""
    bits = (masks[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & jnp.uint32(1)
    return bits.reshape(masks.shape[0], -1)[:, :vocab_size] != jnp.uint32(0)


def first_argmax(values: jax.Array) -> jax.Array:
    """int32 [R]: lowest index of the largest value of each row of float32 [R, V]."""
    best = jnp.max(values, axis=1, keepdims=True)
    places = jax.lax.broadcasted_iota(jnp.int32, values.shape, 1)
    return jnp.min(jnp.where(values == best, places, jnp.int32(values.shape[1] - 1)), axis=1)


def _adjust(raw: jax.Array, state: SamplingState, rows: SamplingRows) -> jax.Array:
    """Bias, bans and penalties of each row's slot: float32 [R, V]."""
    count, vocab_size = raw.shape
    every_row = jnp.arange(count, dtype=jnp.int32)[:, None]
    nowhere = jnp.int32(vocab_size)
    bias_ids = jnp.where(rows.has_bias[:, None], state.bias_ids[rows.slots], nowhere)
    adjusted = raw.at[every_row, bias_ids].add(state.bias_values[rows.slots], mode="drop")
    ban_ids = jnp.where(rows.bans[:, None], state.ban_ids[rows.slots], nowhere)
    adjusted = adjusted.at[every_row, ban_ids].set(-jnp.inf, mode="drop")

    def penalize() -> jax.Array:
        counts = jnp.where(rows.has_penalties[:, None], state.token_counts[rows.slots], jnp.int32(0))
        outputs = (counts & jnp.int32(PROMPT_FLAG - 1)).astype(jnp.float32)
        repetition = jnp.where(counts != jnp.int32(0), rows.repetition_penalty[:, None], jnp.float32(1))
        penalized = jnp.where(adjusted > jnp.float32(0), adjusted / repetition, adjusted * repetition)
        penalized = penalized - rows.frequency_penalty[:, None] * outputs
        return penalized - jnp.where(outputs > jnp.float32(0), rows.presence_penalty[:, None], jnp.float32(0))

    return jax.lax.cond(jnp.any(rows.has_penalties), penalize, lambda: adjusted)


def _distribution(adjusted: jax.Array, rows: SamplingRows) -> _Distribution:
    """The rows' distributions before any truncation, not yet summed; greedy rows have temperature 1."""
    best = jnp.max(adjusted, axis=1)
    neutral = jnp.zeros_like(best)
    return _Distribution(
        best=jnp.where(best == -jnp.inf, jnp.float32(0), best),
        temperature=jnp.where(rows.temperature > jnp.float32(0), rows.temperature, jnp.float32(1)),
        bound=neutral + jnp.float32(jnp.inf),
        log_sum=neutral,
        entropy=neutral,
        typical_bound=neutral + jnp.float32(jnp.inf),
        log_kept=neutral,
    )


def _take_best(adjusted: jax.Array, rows: SamplingRows) -> tuple[jax.Array, _Distribution]:
    distribution = _distribution(adjusted, rows)

    def summed() -> jax.Array:
        return jnp.log(jnp.sum(jnp.exp(-distribution.distances(adjusted)), axis=1))

    log_kept = jax.lax.cond(jnp.any(rows.wants_logprobs), summed, lambda: distribution.log_kept)
    return first_argmax(adjusted), replace(distribution, log_kept=log_kept)


def _draw(adjusted: jax.Array, rows: SamplingRows) -> tuple[jax.Array, _Distribution]:
    """Truncate, then Gumbel-max in its exponential form: the token with the largest weight / noise."""
    plain = _distribution(adjusted, rows)
    distances = plain.distances(adjusted)
    weights = jnp.exp(-distances)
    truncates = (
        (rows.min_p > jnp.float32(0)) | (rows.top_k > jnp.int32(0)) | (rows.top_p < jnp.float32(1)) | (rows.typical_p < jnp.float32(1))
    )

    def untruncated() -> _Distribution:
        return replace(plain, log_kept=jnp.log(jnp.sum(weights, axis=1)))

    distribution = jax.lax.cond(jnp.any(truncates), lambda: _truncate(plain, distances, weights, rows), untruncated)
    noise = exponential_noise(rows.seed_low, rows.seed_high, rows.positions, jnp.arange(adjusted.shape[1], dtype=jnp.int32))
    race = jnp.where(distribution.keeps(distances), weights / noise, jnp.float32(-1))
    greedy = (rows.temperature == jnp.float32(0))[:, None]
    return first_argmax(jnp.where(greedy, -distances, race)), distribution


def _truncate(plain: _Distribution, distances: jax.Array, weights: jax.Array, rows: SamplingRows) -> _Distribution:
    """min_p, top_k, top_p, then typical_p."""
    unbounded = plain.bound

    def top_k_bound() -> jax.Array:
        ones = jnp.ones_like(weights)
        bound = covering_threshold(distances, ones, rows.top_k.astype(jnp.float32))
        return jnp.where(rows.top_k > jnp.int32(0), bound, unbounded)

    def mass(bound: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(distances <= bound[:, None], weights, jnp.float32(0)), axis=1)

    bound = -jnp.log(rows.min_p)
    bound = jnp.minimum(bound, jax.lax.cond(jnp.any(rows.top_k > jnp.int32(0)), top_k_bound, lambda: unbounded))

    def top_p_bound() -> jax.Array:
        kept = jnp.where(distances <= bound[:, None], weights, jnp.float32(0))
        nucleus = covering_threshold(distances, kept, rows.top_p * jnp.sum(kept, axis=1))
        return jnp.where(rows.top_p < jnp.float32(1), jnp.minimum(nucleus, bound), bound)

    bound = jax.lax.cond(jnp.any(rows.top_p < jnp.float32(1)), top_p_bound, lambda: bound)
    total = mass(bound)
    truncated = replace(plain, bound=bound, log_kept=jnp.log(total))

    def typical() -> _Distribution:
        kept = distances <= bound[:, None]
        mean_distance = jnp.sum(jnp.where(kept, weights * jnp.where(kept, distances, jnp.float32(0)), jnp.float32(0)), axis=1) / total
        entropy = truncated.log_kept + mean_distance
        surprises = jnp.where(kept, jnp.abs(distances + truncated.log_kept[:, None] - entropy[:, None]), jnp.inf)
        threshold = covering_threshold(surprises, jnp.where(kept, weights, jnp.float32(0)), rows.typical_p * total)
        wanted = rows.typical_p < jnp.float32(1)
        threshold = jnp.where(wanted, threshold, jnp.inf)
        total_kept = jnp.sum(jnp.where(kept & (surprises <= threshold[:, None]), weights, jnp.float32(0)), axis=1)
        return replace(truncated, log_sum=truncated.log_kept, entropy=entropy, typical_bound=threshold, log_kept=jnp.log(total_kept))

    return jax.lax.cond(jnp.any(rows.typical_p < jnp.float32(1)), typical, lambda: truncated)


def _tokens(raw: jax.Array, adjusted: jax.Array, token_ids: jax.Array, distribution: _Distribution, rows: SamplingRows) -> SampledTokens:
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
    count, vocab_size = logits.shape
    num_blocks = max(-(-vocab_size // _TOP_BLOCK), number)
    padding = jnp.full((count, num_blocks * _TOP_BLOCK - vocab_size), -jnp.inf, jnp.float32)
    blocks = jnp.concatenate([logits, padding], axis=1).reshape(count, num_blocks, _TOP_BLOCK)
    _, best_blocks = jax.lax.top_k(jnp.max(blocks, axis=2), number)
    best_blocks = jnp.sort(best_blocks, axis=1)
    candidates = jnp.take_along_axis(blocks, best_blocks[:, :, None], axis=1).reshape(count, number * _TOP_BLOCK)
    values, places = jax.lax.top_k(candidates, number)
    block, offset = places // jnp.int32(_TOP_BLOCK), places % jnp.int32(_TOP_BLOCK)
    return values, jnp.take_along_axis(best_blocks, block, axis=1) * jnp.int32(_TOP_BLOCK) + offset


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


def unpack_sampled(packed: np.ndarray) -> SampledTokens:
    """numpy views of what `pack_sampled` packed: the same fields, on the host."""
    count, per_row = packed.shape
    depth = (per_row - 1) // (3 + 3 * MAX_TOP_LOGPROBS)
    widths = [1, *[depth] * 3, *[depth * MAX_TOP_LOGPROBS] * 3]
    ends = np.cumsum(widths)
    counts, token_ids, raw, processed, top_ids, top_raw, top_processed = (
        packed[:, end - w : end] for w, end in zip(widths, ends, strict=True)
    )
    shape = (count, depth, MAX_TOP_LOGPROBS)
    return SampledTokens(
        token_ids=token_ids,  # pyright: ignore[reportArgumentType]
        counts=counts[:, 0],  # pyright: ignore[reportArgumentType]
        raw=raw.view(np.float32),  # pyright: ignore[reportArgumentType]
        processed=processed.view(np.float32),  # pyright: ignore[reportArgumentType]
        top_ids=top_ids.reshape(shape),  # pyright: ignore[reportArgumentType]
        top_raw=top_raw.view(np.float32).reshape(shape),  # pyright: ignore[reportArgumentType]
        top_processed=top_processed.view(np.float32).reshape(shape),  # pyright: ignore[reportArgumentType]
    )
