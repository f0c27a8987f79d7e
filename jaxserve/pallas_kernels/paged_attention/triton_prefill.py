"""Attention of prompt chunks over a paged KV cache for NVIDIA GPUs from sm_80 on, in Pallas-Triton.

One program a tile of the flat token axis and query head, as in mosaic_prefill.py: a tile with tokens of several rows walks the pages of
one after the other, each time with the other rows' tokens masked (FlashAttention-2, https://arxiv.org/abs/2307.08691).
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jaxserve.pallas_kernels.layer_kv import FLOAT8, LayerKV
from jaxserve.pallas_kernels.metadata import AttentionMetadata, Queries
from jaxserve.pallas_kernels.paged_attention.combine import MASKED
from jaxserve.pallas_kernels.paged_attention.prefill_plan import PrefillPlan, plan_prefill, span_of_row
from jaxserve.pallas_kernels.paged_attention.triton_decode import padded_lanes, soft_capped


@dataclass(frozen=True)
class TritonPrefillConfig:
    """How the kernel is cut: tokens a tile, KV tokens a block, warps a program, blocks in flight."""

    block_q: int = 128
    block_kv: int = 64
    num_warps: int = 4
    num_stages: int = 3

    @classmethod
    def suited(cls, q: Queries) -> "TritonPrefillConfig":
        """The cut measured best on an H200 (docs/performance_gpu.md) for q [T, H, D]."""
        return cls() if q.shape[2] <= 128 else cls(64, 32, 4, 2)


@functools.partial(jax.jit, static_argnames=("scale", "window", "soft_cap", "config", "out_dtype", "interpret"))
def prefill_attention_triton(
    q: jax.Array,
    kv: LayerKV,
    metadata: AttentionMetadata,
    *,
    plan: PrefillPlan | None = None,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    config: TritonPrefillConfig,
    out_dtype: jnp.dtype | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Bottom-right causal attention of each token over its row's pages: q [T, H, D] -> [T, H, D]; finite for padding tokens.

    A float8 cache is read as float16, which holds every float8 value. The result is of `out_dtype`, q's if not another one.

    Args:
        plan: of tiles of the config's `block_q` tokens; None: made for this call.
    """
    num_tokens, num_heads, _ = q.shape
    plan = plan or plan_prefill(metadata, num_tokens=num_tokens, block_q=config.block_q)
    operands = (
        q, *kv, metadata.page_table, metadata.kv_lens, metadata.query_starts, plan.tiles, plan.first_rows, plan.end_rows,
    )  # fmt: skip
    return pl.pallas_call(
        functools.partial(_prefill_kernel, scale=scale, window=window, soft_cap=soft_cap, config=config),
        grid=(num_heads, plan.tiles.shape[0]),
        in_specs=[pl.no_block_spec] * len(operands),
        out_specs=pl.no_block_spec,
        out_shape=jax.ShapeDtypeStruct(q.shape, out_dtype or q.dtype),
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=interpret,
        name="paged_prefill",
    )(*operands)


def _prefill_kernel(
    q_ref, keys_ref, values_ref, table_ref, lens_ref, starts_ref, tiles_ref, first_rows_ref, end_rows_ref, out_ref,
    *, scale: float, window: int | None, soft_cap: float | None, config: TritonPrefillConfig,
):  # fmt: skip
    block_q, block_kv = config.block_q, config.block_kv
    num_tokens, num_heads, head_dim = q_ref.shape
    num_kv_heads, page_size = keys_ref.shape[1:3]
    padded_dim = pl.next_power_of_2(head_dim)
    dim, column = padded_lanes(head_dim)
    head = pl.program_id(0)
    kv_head = head // (num_heads // num_kv_heads)
    tile = tiles_ref[pl.program_id(1)]
    tile_start = tile * block_q
    token = jnp.minimum(tile_start + jnp.arange(block_q, dtype=jnp.int32), num_tokens - 1)
    q = q_ref[column(token), head, dim]
    unit = scale
    if padded_dim != head_dim:
        q = jnp.where(jnp.arange(padded_dim, dtype=jnp.int32)[None, :] < head_dim, q, jnp.zeros_like(q))
    if keys_ref.dtype in FLOAT8:
        q, unit = (q.astype(jnp.float32) * scale).astype(jnp.float16), 1.0

    def attend_row(row, carry):
        part = span_of_row(
            starts_ref[row], starts_ref[row + 1], lens_ref[row], tile_start, block_q=block_q, block_kv=block_kv, window=window
        )
        latest = jnp.where((token >= part.start) & (token < part.end), token + part.offset, -1)

        def block(masked: bool, i, carry):
            total, maximum, weight = carry
            position = i * block_kv + jnp.arange(block_kv, dtype=jnp.int32)
            page = table_ref[row, jnp.minimum(position // page_size, table_ref.shape[1] - 1)]
            place = column(page), kv_head, column(position % page_size), dim
            scores = soft_capped(plt.dot(q, keys_ref[place].astype(q.dtype).T), soft_cap, unit)
            if masked:
                scores = jnp.where(position[None, :] <= latest[:, None], scores, MASKED)
                if window is not None:
                    scores = jnp.where(position[None, :] > latest[:, None] - window, scores, MASKED)
            new_maximum = jnp.maximum(maximum, scores.max(axis=1))
            decay = jnp.exp2(maximum - new_maximum)
            p = jnp.exp2(scores - new_maximum[:, None])
            total = total * decay[:, None] + plt.dot(p.astype(q.dtype), values_ref[place].astype(q.dtype))
            return total, new_maximum, weight * decay + p.sum(axis=1)

        if window is not None:
            carry = lax.fori_loop(part.begin, part.full_begin, functools.partial(block, True), carry)
        carry = lax.fori_loop(part.full_begin, part.full_end, functools.partial(block, False), carry)
        return lax.fori_loop(part.full_end, part.stop, functools.partial(block, True), carry)

    nothing = (
        jnp.zeros((block_q, padded_dim), jnp.float32),
        jnp.full((block_q,), MASKED, jnp.float32),
        jnp.zeros((block_q,), jnp.float32),
    )
    total, _, weight = lax.fori_loop(first_rows_ref[tile], end_rows_ref[tile], attend_row, nothing)
    out_ref[column(token), head, dim] = (total / jnp.maximum(weight, 1e-30)[:, None]).astype(out_ref.dtype)
