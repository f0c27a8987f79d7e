"""The sampler: logits in, one token a row out, whatever the rows ask for.

The order of operations is vLLM's: logit bias, bans, penalties (repetition, then presence and frequency), grammar mask; temperature,
min_p, top_k, top_p, typical_p; Gumbel-max. Raw logprobs are of the logits as the model gave them, processed ones of the distribution
that is sampled (for a greedy row: at temperature 1, nothing truncated).

Three functions, each a program of its own: token masks before, log probabilities after. So a batch that wants neither pays for neither,
and what chooses the tokens is compiled once a number of rows. On a GPU kernels choose them (pallas_kernels/token_choice): XLA would bring
the predicate of a conditional to the host. Elsewhere XLA does all, each costly part under a `lax.cond` on whether any row wants it. A
greedy batch pays for an argmax.

Ties: the lowest token id wins an argmax; a truncation keeps or drops equal logits together.

All of it is of whole rows; sharded_sampler.py is the same where a vocabulary is cut over the shards of a mesh.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.pallas_kernels import local_gpu, log_sum_exp
from jaxserve.pallas_kernels.noise import exponential_noise, is_green, noise_keys
from jaxserve.pallas_kernels.token_options import adjust_logits
from jaxserve.request import MAX_TOP_LOGPROBS
from jaxserve.runner.distribution import Distribution, sum_masses, truncate, whole_distribution
from jaxserve.runner.sampling_rows import SamplingRows, unpack_rows
from jaxserve.runner.sampling_state import SamplingState
from jaxserve.step import StepLogprobs, StepResult

_BLOCK = 128
SAMPLED_COLUMNS = 9  # whether the row samples, its token, the one before, the attributes of Distribution


def apply_masks(logits: jax.Array, masks: jax.Array) -> jax.Array:
    """Logits with -inf at the tokens that are not allowed: whatever is done to logits leaves -inf as it is.

    Args:
        logits: float32 [R, W], where W may be more than the vocabulary's size V.
        masks: uint32 [R, ceil(V / 32)], bit t % 32 of word t // 32 allows token t.
    """
    return jnp.where(unpack_masks(masks, logits.shape[1]), logits, -jnp.inf)


def sample(logits: jax.Array, state: SamplingState, columns: jax.Array) -> tuple[jax.Array, SamplingState]:
    """Choose a token for each row. Called inside a jit.

    Args:
        logits: float32 [R, V] or wider: columns from the state's V on are padding and never chosen.
        state: by slot; donated by the caller.
        columns: int32 [R, NUM_SAMPLING_COLUMNS], what each row asks for.

    Returns:
        int32 [R, SAMPLED_COLUMNS], which `unpack_sampled` and `find_logprobs` read; the state with counts and last tokens of the rows
        that sample.
    """
    rows = unpack_rows(columns)
    raw = logits[:, : state.token_counts.shape[1]]
    previous = previous_tokens(state, rows)
    choose = choose_by_xla if local_gpu() is None else _choose_by_kernel
    token_ids, distribution, new_state = choose(raw, state, columns)
    return pack_columns(rows.samples, token_ids, previous, *jax.tree.leaves(distribution)), new_state


def find_logprobs(raw: jax.Array, logits: jax.Array, state: SamplingState, columns: jax.Array, sampled: jax.Array) -> jax.Array:
    """Log probabilities of the tokens that `sample` chose, and of the likeliest ones.

    Args:
        raw: float32 [R, V] or wider, as the model gave them.
        logits: those that `sample` took: where there are no masks, the same.
        state: the one that it returned.
        columns: as it took them; rows that want no log probabilities get some that mean nothing.
        sampled: what it returned.

    Returns:
        What `unpack_sampled` reads, int32 [R, 4 + 3 * MAX_TOP_LOGPROBS].
    """
    rows = unpack_rows(columns)
    vocab_size = state.token_counts.shape[1]
    raw, logits = raw[:, :vocab_size], logits[:, :vocab_size]
    token_ids, previous = sampled[:, 1], sampled[:, 2]
    stats = jax.lax.bitcast_convert_type(sampled[:, 3:], jnp.float32)
    distribution = Distribution(*(stats[:, i] for i in range(stats.shape[1])))
    log_sum = log_sum_exp(raw)[:, None]
    top_logits, top_ids = top_tokens(raw, MAX_TOP_LOGPROBS)
    ids = jnp.concatenate([token_ids[:, None], top_ids], axis=1)
    processed = distribution.logprobs(adjust_at(ids, ids, logits, state, rows, previous, token_ids))
    chosen = jnp.take_along_axis(raw, token_ids[:, None], axis=1)
    return pack_columns(sampled[:, 0], token_ids, chosen - log_sum, processed[:, :1], top_ids, top_logits - log_sum, processed[:, 1:])


def _choose_by_kernel(raw: jax.Array, state: SamplingState, columns: jax.Array) -> tuple[jax.Array, Distribution, SamplingState]:
    # Pallas takes over a second to import: not where there is no GPU.
    from jaxserve.pallas_kernels.token_choice import choose_tokens

    rows = unpack_rows(columns)
    keys = noise_keys(rows.seed_low, rows.seed_high, rows.positions)
    choice = choose_tokens(raw, columns, keys, state.token_counts, state.bias, state.last_tokens)
    distribution = Distribution(*(choice.stats[:, i] for i in range(choice.stats.shape[1])))
    return choice.token_ids, distribution, replace(state, token_counts=choice.token_counts, last_tokens=choice.last_tokens)


def choose_by_xla(raw: jax.Array, state: SamplingState, columns: jax.Array) -> tuple[jax.Array, Distribution, SamplingState]:
    """What `sample` packs: int32 [R] token ids, what was sampled, as far as any row needs to know, and the state."""
    rows = unpack_rows(columns)
    adjusted = adjust(raw, jnp.arange(raw.shape[1], dtype=jnp.int32), state, rows)
    draws = jnp.any(rows.draws)
    distribution = _distribution(adjusted, rows, draws, jnp.any(rows.wants_logprobs))
    token_ids = jax.lax.cond(draws, lambda: _draw(adjusted, distribution, rows), lambda: first_argmax(adjusted))
    return token_ids, distribution, remember(state, rows, token_ids, token_ids)


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


def adjust(raw: jax.Array, token_ids: jax.Array, state: SamplingState, rows: SamplingRows) -> jax.Array:
    """Bias, watermark, bans and penalties of each row's slot: float32 [R, N] of the state's N tokens, whose ids are int32 [N]."""

    def adjusted() -> jax.Array:
        green = is_green(previous_tokens(state, rows), token_ids, rows.green_share)
        return _adjusted(raw, state.bias[rows.slots], state.token_counts[rows.slots], green, rows)

    return jax.lax.cond(jnp.any(rows.has_bias | rows.bans | rows.has_penalties | rows.has_watermark), adjusted, lambda: raw)


def adjust_at(
    places: jax.Array,
    ids: jax.Array,
    logits: jax.Array,
    state: SamplingState,
    rows: SamplingRows,
    previous: jax.Array,
    token_ids: jax.Array,
) -> jax.Array:
    """The same of the tokens at `places` [R, N] alone, in a state that has the tokens just chosen already.

    Args:
        places: int32, of logits and state.
        ids: int32 [R, N], of these tokens.
        previous, token_ids: int32 [R], the tokens before, and those chosen.
    """
    slots = rows.slots[:, None]
    counts = state.token_counts[slots, places]
    counts -= ((ids == token_ids[:, None]) & (rows.samples & rows.has_penalties)[:, None]).astype(jnp.int32)
    green = is_green(previous, ids, rows.green_share)
    return _adjusted(jnp.take_along_axis(logits, places, axis=1), state.bias[slots, places], counts, green, rows)


def _adjusted(raw: jax.Array, bias: jax.Array, counts: jax.Array, green: jax.Array, rows: SamplingRows) -> jax.Array:
    def wide(x: jax.Array) -> jax.Array:
        return jnp.broadcast_to(x[:, None], raw.shape)

    bias = jnp.where(wide(rows.has_bias), bias, jnp.float32(0)) + jnp.where(green, wide(rows.green_bias), jnp.float32(0))
    options = rows.bans, rows.has_penalties, rows.repetition_penalty, rows.presence_penalty, rows.frequency_penalty
    return adjust_logits(raw, bias, counts, *map(wide, options))


def previous_tokens(state: SamplingState, rows: SamplingRows) -> jax.Array:
    """int32 [R], the token before the one that is to be chosen."""
    return jnp.where(rows.previous < 0, state.last_tokens[rows.slots, 0], rows.previous)


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
    scores = race_scores(distances, distribution.keeps(distances), jnp.arange(adjusted.shape[1], dtype=jnp.int32), rows)
    return first_argmax(jnp.where(rows.draws[:, None], scores, -distances))


def race_scores(distances: jax.Array, kept: jax.Array, token_ids: jax.Array, rows: SamplingRows) -> jax.Array:
    """Probability / noise, float32 [R, N] as `distances`, -1 where not `kept`, of tokens whose ids are int32 [N]."""
    noise = exponential_noise(noise_keys(rows.seed_low, rows.seed_high, rows.positions), token_ids)
    return jnp.where(kept, jnp.exp(-distances) / noise, jnp.float32(-1))


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


def remember(state: SamplingState, rows: SamplingRows, token_ids: jax.Array, places: jax.Array) -> SamplingState:
    """Count and keep the tokens of the rows that sample, int32 [R]; `places` are theirs in the counts, beyond which none is counted."""
    nowhere = jnp.int32(state.last_tokens.shape[0])
    slots = jnp.where(rows.samples, rows.slots, nowhere)
    counted = jnp.where(rows.has_penalties, slots, nowhere)
    return replace(
        state,
        token_counts=state.token_counts.at[counted, places].add(jnp.int32(1), mode="drop"),
        last_tokens=state.last_tokens.at[slots].set(token_ids[:, None], mode="drop"),
    )


def pack_columns(*columns: jax.Array) -> jax.Array:
    """Arrays [R] or [R, n] of 4 bytes an element, or bool, side by side in one int32 array, so that one copy brings all to the host."""
    wide = [column.astype(jnp.int32) if column.dtype == jnp.bool_ else column for column in columns]
    return jnp.concatenate([jax.lax.bitcast_convert_type(x, jnp.int32).reshape(x.shape[0], -1) for x in wide], axis=1)


def unpack_sampled(packed: np.ndarray) -> StepResult:
    """numpy views of what `sample` or `find_logprobs` packed."""
    counts, token_ids = packed[:, 0], packed[:, 1:2]
    if packed.shape[1] == SAMPLED_COLUMNS:
        return StepResult(token_ids, counts)
    raw, processed, top_ids, top_raw, top_processed = np.split(packed[:, 2:], np.cumsum([1, 1, *[MAX_TOP_LOGPROBS] * 2]), axis=1)
    logprobs = StepLogprobs(
        raw=raw.view(np.float32),
        processed=processed.view(np.float32),
        top_ids=top_ids[:, None],
        top_raw=top_raw.view(np.float32)[:, None],
        top_processed=top_processed.view(np.float32)[:, None],
    )
    return StepResult(token_ids, counts, logprobs)
