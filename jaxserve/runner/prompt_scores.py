"""Scores of prompts: the log probability of each of a prompt's tokens, given those before it.

A forward makes logits only of the tokens that are sampled, and leaves what the last layer gave for all others in the device state. Where
a request wants its prompt scored, a program of its own makes the logits of some of them at a time.
"""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.pallas_kernels import log_sum_exp
from jaxserve.request import MAX_TOP_LOGPROBS
from jaxserve.runner.batch import Batch
from jaxserve.runner.sampler import top_tokens
from jaxserve.step import ScoredTokens


def pack_scored(batch: Batch, size: int) -> Iterator[np.ndarray]:
    """What a step's rows want scored.

    Args:
        batch: num_scored is not 0.
        size: tokens a call.

    Yields:
        int32 [2, size]: where in the step the tokens are, and which token follows each in its prompt; the last one padded.
    """
    scored = np.zeros((2, -(-batch.num_scored // size) * size), np.int32)
    begin = place = 0
    for row in batch.rows:
        if row.num_scored:
            end = begin + row.num_scored
            scored[0, begin:end] = np.arange(place, place + row.num_scored)
            scored[1, begin:end] = row.sample.request.prompt_token_ids[row.start + 1 : row.start + 1 + row.num_scored]
            begin = end
        place += row.num_tokens
    for begin in range(0, scored.shape[1], size):
        yield scored[:, begin : begin + size]


def score_tokens(logits: jax.Array, token_ids: jax.Array) -> jax.Array:
    """Score tokens against the logits that foretold them.

    Args:
        logits: float32 [S, V].
        token_ids: int32 [S].

    Returns:
        what `unpack_scored` reads, int32 [S, 2 + 2N].
    """
    log_sum = log_sum_exp(logits)[:, None]
    own = jnp.take_along_axis(logits, token_ids[:, None], axis=1)
    ranks = jnp.sum(logits > own, axis=1, dtype=jnp.int32, keepdims=True) + jnp.int32(1)
    top_logits, top_ids = top_tokens(logits, MAX_TOP_LOGPROBS)
    columns = own - log_sum, ranks, top_ids, top_logits - log_sum
    return jnp.concatenate([jax.lax.bitcast_convert_type(column, jnp.int32) for column in columns], axis=1)


def unpack_scored(parts: Sequence[np.ndarray], count: int) -> ScoredTokens:
    """The first `count` tokens of what some calls of `score_tokens` gave."""
    packed = np.concatenate(parts)[:count]
    raw, ranks, top_ids, top_raw = np.split(packed, np.cumsum([1, 1, MAX_TOP_LOGPROBS]), axis=1)
    return ScoredTokens(raw[:, 0].view(np.float32), ranks[:, 0], top_ids, top_raw.view(np.float32))
