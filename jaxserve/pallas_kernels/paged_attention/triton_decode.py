"""Decode attention over a paged KV cache for NVIDIA GPUs from sm_80 on, in Pallas-Triton.

One program a share of the plan (see decode_plan.py): it walks the (row, KV head) pairs of its share with an online softmax
(Flash-Decoding, https://pytorch.org/blog/flash-decoding/, with float32 partial results), then a second kernel adds up the pairs that
several programs shared (combine.py).
"""

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jaxserve.pallas_kernels.layer_kv import LayerKV
from jaxserve.pallas_kernels.paged_attention.combine import MASKED, combine_partials
from jaxserve.pallas_kernels.paged_attention.decode_plan import DecodePlan, plan_decode

FLOAT8 = (jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.float8_e5m2))


@dataclass(frozen=True)
class TritonDecodeConfig:
    """How the kernel is cut: tokens a block, warps a program, blocks in flight, programs (shares) of the whole grid."""

    block_kv: int = 64
    num_warps: int = 4
    num_stages: int = 3
    num_workers: int = 132 * 3

    @classmethod
    def suited(cls, q: jax.Array, kv: LayerKV, num_multiprocessors: int) -> "TritonDecodeConfig":
        """The cut measured best on an H200 (docs/performance_gpu.md)."""
        padded_dim = pl.next_power_of_2(q.shape[2])
        block_kv = max(16, min(128, 64 * 128 // padded_dim))
        if kv[0].dtype in FLOAT8:
            return cls(block_kv, 1, 3, 8 * num_multiprocessors)
        return cls(block_kv, 4, 3, 3 * num_multiprocessors)


def soft_capped(scores: jax.Array, soft_cap: float | None, unit: float) -> jax.Array:
    """soft_cap * tanh(scores * unit / soft_cap), or scores * unit without a cap, times log2(e): what exp2 takes."""
    if soft_cap is None:
        return scores * (unit * math.log2(math.e))
    doubled = jnp.exp2(scores * (unit / soft_cap * 2 * math.log2(math.e)))
    return (1 - 2 / (doubled + 1)) * (soft_cap * math.log2(math.e))


def decode_attention_triton(
    q: jax.Array,
    kv: LayerKV,
    page_table: jax.Array,
    kv_lens: jax.Array,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    config: TritonDecodeConfig,
    interpret: bool = False,
) -> jax.Array:
    """Attention of one token a row: q [R, H, D], page_table int32 [R, P], kv_lens int32 [R] -> [R, H, D]; zeros for a padding row.

    A float8 cache is read as float16, which holds every float8 value (Triton converts one to the other in half an instruction).
    """
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads = kv[0].shape[1]
    group = num_heads // num_kv_heads
    plan = plan_decode(kv_lens, num_kv_heads=num_kv_heads, block_kv=config.block_kv, window=window, num_workers=config.num_workers)
    kernel = functools.partial(_decode_kernel, scale=scale, window=window, soft_cap=soft_cap, block_kv=config.block_kv)
    partials = config.num_workers, 2, group
    whole, sums, maxima, weights = pl.pallas_call(
        kernel,
        grid=(config.num_workers,),
        out_shape=(
            jax.ShapeDtypeStruct((num_rows, num_kv_heads, group, head_dim), q.dtype),
            jax.ShapeDtypeStruct((*partials, head_dim), jnp.float32),
            jax.ShapeDtypeStruct(partials, jnp.float32),
            jax.ShapeDtypeStruct(partials, jnp.float32),
        ),
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=interpret,
        name="paged_decode",
    )(q.reshape(num_rows, num_kv_heads, group, head_dim), *kv, page_table, kv_lens, plan)
    return combine_partials(whole, sums, maxima, weights, plan, interpret=interpret).reshape(q.shape)


def padded_lanes(size: int):
    """How to index the last axis of `size` elements, and the axes beside it.

    Tiles are powers of two: a size that is none is padded by repeating the last element, so that what the surplus reads is valid, and
    what it writes is the same value again.

    Returns:
        The index of the last axis, and a function from the indices of a tile's rows to the indices that go with it.
    """
    padded = pl.next_power_of_2(size)
    if padded == size:
        return slice(None), lambda rows: rows
    return jnp.minimum(jnp.arange(padded, dtype=jnp.int32), size - 1)[None, :], lambda rows: rows[:, None]


def _decode_kernel(
    q_ref, keys_ref, values_ref, table_ref, lens_ref, plan_refs: DecodePlan, out_ref, sums_ref, maxima_ref, weights_ref,
    *, scale: float, window: int | None, soft_cap: float | None, block_kv: int,
):  # fmt: skip
    num_rows, num_kv_heads, group, head_dim = q_ref.shape
    num_workers = sums_ref.shape[0]
    page_size = keys_ref.shape[2]
    group_lanes = jnp.minimum(jnp.arange(max(16, pl.next_power_of_2(group)), dtype=jnp.int32), group - 1)
    padded_dim = pl.next_power_of_2(head_dim)
    dim, column = padded_lanes(head_dim)
    worker = pl.program_id(0)
    end = plan_refs.worker_starts[worker + 1]

    def attend(row, head, begin, stop):
        """Online softmax over blocks [begin, stop) of a row's KV head: weighted values, maxima and weights of its query heads."""
        q = q_ref[row, head, column(group_lanes), dim]
        unit = scale
        if padded_dim != head_dim:
            q = jnp.where(jnp.arange(padded_dim, dtype=jnp.int32)[None, :] < head_dim, q, jnp.zeros_like(q))
        if keys_ref.dtype in FLOAT8:
            q, unit = (q.astype(jnp.float32) * scale).astype(jnp.float16), 1.0
        kv_len = lens_ref[row]
        first = plan_refs.first_blocks[row]

        def block(i, carry):
            total, maximum, weight = carry
            token = (first + i) * block_kv + jnp.arange(block_kv, dtype=jnp.int32)
            page = table_ref[row, jnp.minimum(token, kv_len - 1) // page_size]
            place = column(page), head, column(token % page_size), dim
            keys = keys_ref[place].astype(q.dtype)
            scores = soft_capped(plt.dot(q, keys.T), soft_cap, unit)
            visible = token < kv_len
            if window is not None:
                visible &= token >= kv_len - window
            scores = jnp.where(visible[None, :], scores, MASKED)
            new_maximum = jnp.maximum(maximum, scores.max(axis=1))
            decay = jnp.exp2(maximum - new_maximum)
            exponentials = jnp.exp2(scores - new_maximum[:, None])
            values = values_ref[place].astype(q.dtype)
            total = total * decay[:, None] + plt.dot(exponentials.astype(q.dtype), values)
            return total, new_maximum, weight * decay + exponentials.sum(axis=1)

        nothing = (
            jnp.zeros((group_lanes.size, padded_dim), jnp.float32),
            jnp.full((group_lanes.size,), MASKED, jnp.float32),
            jnp.zeros((group_lanes.size,), jnp.float32),
        )
        return lax.fori_loop(begin, stop, block, nothing)

    def pair(carry):
        position, row = carry
        row_start, row_end = plan_refs.row_starts[row], plan_refs.row_starts[row + 1]
        blocks = (row_end - row_start) // num_kv_heads
        head = (position - row_start) // jnp.maximum(blocks, 1)
        begin = position - row_start - head * blocks
        stop = jnp.minimum(begin + end - position, blocks)
        total, maximum, weight = attend(row, head, begin, stop)

        @pl.when(stop - begin == blocks)
        def _():
            out_ref[row, head, column(group_lanes), dim] = (total / jnp.maximum(weight, 1e-30)[:, None]).astype(out_ref.dtype)

        @pl.when(stop - begin < blocks)
        def _():
            place = jnp.where(begin == 0, 1, 0)
            sums_ref[worker, place, column(group_lanes), dim] = total
            maxima_ref[worker, place, group_lanes] = maximum
            weights_ref[worker, place, group_lanes] = weight

        position += stop - begin
        return position, jnp.where(position == row_end, row + 1, row)

    lax.while_loop(lambda carry: carry[0] < end, pair, (plan_refs.worker_starts[worker], plan_refs.worker_rows[worker]))

    @pl.loop(0, pl.cdiv(num_rows - worker, num_workers))
    def _(i):
        row = worker + i * num_workers

        @pl.when(plan_refs.row_starts[row] == plan_refs.row_starts[row + 1])
        def _():
            for head in range(num_kv_heads):
                out_ref[row, head, column(group_lanes), dim] = jnp.zeros((group_lanes.size, padded_dim), out_ref.dtype)
