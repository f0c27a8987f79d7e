"""Adding up the partial results of (row, KV head) pairs that several workers of the Mosaic decode kernel shared, in Pallas-Triton."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jaxserve.pallas_kernels.paged_attention.decode_plan import DecodePlan, worker_of_block

MASKED = -1e30  # a score that counts for nothing; finite: a maximum over masked scores alone must not make NaN
DIMS = 32  # head dimensions a program, so that few pairs keep many multiprocessors busy
FEW = 8  # partial results (of 4 query heads) read at once where a pair has no more; one long row has many, read 8 times as many at once


def combine_transposed(
    out: jax.ShapeDtypeStruct,
    sums: jax.Array,
    maxima: jax.Array,
    weights: jax.Array,
    plan: DecodePlan,
    *,
    pairs_per_tile: int,
    interpret: bool,
) -> jax.Array:
    """The output [R, KH, G, D] from results of W workers, partial and whole.

    Args:
        sums: float32 [2 W + R KH, D, L] values weighted by exp2(score - maximum): two places a worker (see decode_plan.py), then one
            for each pair that a worker computed alone. L lanes hold the query heads of `pairs_per_tile` pairs.
        maxima, weights: float32 [2 W + R KH, L] their maxima and sums of weights.
    """
    num_rows, num_kv_heads, _, head_dim = out.shape
    return pl.pallas_call(
        functools.partial(_combine_all_kernel, pairs_per_tile=pairs_per_tile),
        grid=(num_rows, num_kv_heads, head_dim // DIMS),
        in_specs=[pl.no_block_spec] * 5,
        out_specs=pl.no_block_spec,
        out_shape=out,
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="paged_decode_combine",
    )(sums, maxima, weights, plan.row_starts, plan.worker_starts)


def _combine_all_kernel(sums_ref, maxima_ref, weights_ref, row_starts_ref, worker_starts_ref, out_ref, *, pairs_per_tile: int):
    num_rows, num_kv_heads, group, _ = out_ref.shape
    num_workers = worker_starts_ref.shape[0] - 1
    row, head = pl.program_id(0), pl.program_id(1)
    dim = pl.program_id(2) * DIMS + jnp.arange(DIMS, dtype=jnp.int32)
    row_start, num_blocks = row_starts_ref[row], row_starts_ref[num_rows]
    blocks = (row_starts_ref[row + 1] - row_start) // num_kv_heads
    first = worker_of_block(row_start + head * blocks, num_blocks, num_workers)
    last = worker_of_block(row_start + head * blocks + jnp.maximum(blocks - 1, 0), num_blocks, num_workers)
    pair = row * num_kv_heads + head
    lane = pair % pairs_per_tile * group + jnp.minimum(jnp.arange(pl.next_power_of_2(group), dtype=jnp.int32), group - 1)

    def read(worker):
        place = jnp.where(first == last, 2 * num_workers + pair, 2 * worker + jnp.where(worker == first, 1, 0))
        stats = place[:, None], lane[None, :]
        return sums_ref[place[:, None, None], dim[None, None, :], lane[None, :, None]], maxima_ref[stats], weights_ref[stats]

    result = _add_up(read, first, jnp.where(blocks == 0, first - 1, last), lane.size)
    member = lane - pair % pairs_per_tile * group
    out_ref[row, head, member[:, None], dim[None, :]] = result.astype(out_ref.dtype)


def _add_up(read, first: jax.Array, last: jax.Array, group: int) -> jax.Array:
    """Attention [G, DIMS] from the results of workers first to last; zeros where there are none.

    Args:
        read: workers int32 [N] -> sums [N, G, DIMS], maxima [N, G], weights [N, G].
    """
    few = FEW * 4 // max(4, pl.next_power_of_2(group))
    return lax.cond(
        last - first < max(1, few),
        lambda: _add_up_by(max(1, few), read, first, last, group),
        lambda: _add_up_by(max(1, few) * 8, read, first, last, group),
    )


def _add_up_by(splits: int, read, first: jax.Array, last: jax.Array, group: int) -> jax.Array:
    def add(i, carry):
        total, maximum, weight = carry
        worker = first + i * splits + jnp.arange(splits, dtype=jnp.int32)
        sums, maxima, weights = read(jnp.minimum(worker, last))
        present = (worker <= last)[:, None]
        maxima = jnp.where(present, maxima, MASKED)
        new_maximum = jnp.maximum(maximum, maxima.max(axis=0))
        share = jnp.where(present, jnp.exp2(maxima - new_maximum[None, :]), 0.0)
        decay = jnp.exp2(maximum - new_maximum)
        total = total * decay[:, None] + (sums * share[:, :, None]).sum(axis=0)
        return total, new_maximum, weight * decay + (weights * share).sum(axis=0)

    nothing = jnp.zeros((group, DIMS), jnp.float32), jnp.full((group,), MASKED, jnp.float32), jnp.zeros((group,), jnp.float32)
    total, _, weight = lax.fori_loop(0, pl.cdiv(last - first + 1, splits), add, nothing)
    return total / jnp.maximum(weight, 1e-30)[:, None]
