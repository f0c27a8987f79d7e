"""Attention of prompt chunks over a paged KV cache for sm_90 (Hopper), in Pallas Mosaic GPU.

A block of threads computes one tile of the flat token axis for one query head: two warpgroups hold half of its tokens each and
take turns at the tensor cores while the other does its softmax, a third fetches pages by TMA (FlashAttention-3,
https://arxiv.org/abs/2407.08608). Tiles lie on the axis itself and not on the rows, so that loads and stores are whole and
aligned: a tile with tokens of several rows walks the pages of one after the other, each time with the other rows' tokens masked.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxserve.pallas_kernels.layer_kv import LayerKV
from jaxserve.pallas_kernels.metadata import AttentionMetadata, Queries
from jaxserve.pallas_kernels.mosaic import COMPUTE_REGISTERS, FETCH_REGISTERS, HEIGHT, swizzled
from jaxserve.pallas_kernels.paged_attention.combine import MASKED
from jaxserve.pallas_kernels.paged_attention.mosaic_decode import takes_pages
from jaxserve.pallas_kernels.paged_attention.prefill_plan import PrefillPlan, RowSpan, plan_prefill, span_of_row
from jaxserve.pallas_kernels.paged_attention.triton_decode import soft_capped

HALF = HEIGHT  # tokens of a warpgroup
BLOCK_Q = 2 * HALF


@dataclass(frozen=True)
class MosaicPrefillConfig:
    """How the kernel is cut: KV tokens a block, and blocks in flight."""

    block_kv: int = 128
    num_stages: int = 2

    @classmethod
    def suited(cls, q: Queries, kv: LayerKV) -> "MosaicPrefillConfig | None":
        """The cut measured best on an H200 (docs/performance_gpu.md) for q [T, H, D]; None where the kernel does not go."""
        _, _, page_size, head_dim = kv[0].shape
        if head_dim % HALF or not takes_pages(page_size) or kv[0].dtype != q.dtype:
            return None
        return cls(128 if head_dim <= 128 else HALF, 2)


@functools.partial(jax.jit, static_argnames=("scale", "window", "soft_cap", "config", "out_dtype", "interpret"))
def prefill_attention_mosaic(
    q: jax.Array,
    kv: LayerKV,
    metadata: AttentionMetadata,
    *,
    plan: PrefillPlan | None = None,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    config: MosaicPrefillConfig,
    out_dtype: jnp.dtype | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Bottom-right causal attention of each token over its row's pages: q [T, H, D] -> [T, H, D]; finite for padding tokens.

    K and V are of q's type, the result of `out_dtype` (q's, or another of as many bits).

    Args:
        plan: of tiles of BLOCK_Q tokens; None: made for this call.
    """
    options: dict[str, Any] = dict(scale=scale, window=window, soft_cap=soft_cap, config=config)
    num_tokens, num_heads, head_dim = q.shape
    page_size = kv[0].shape[2]
    plan = plan or plan_prefill(metadata, num_tokens=num_tokens, block_q=BLOCK_Q)
    num_tiles = plan.tiles.shape[0]
    padded = jnp.pad(q, ((0, num_tiles * BLOCK_Q - num_tokens), (0, 0), (0, 0)))
    tiled = swizzled(head_dim, q.dtype)
    stages = config.num_stages
    kv_tiles = plgpu.SMEM((stages, config.block_kv, head_dim), q.dtype, transforms=tiled)
    filled = plgpu.Barrier(num_arrivals=config.block_kv // page_size, num_barriers=stages)
    emptied = plgpu.Barrier(num_arrivals=2, num_barriers=stages)
    # The interpreter knows neither wgmma with its left side in registers nor accumulators with a first value: weights pass through SMEM.
    weights_smem = [plgpu.SMEM((2, HALF, config.block_kv), q.dtype, transforms=tiled)] if interpret else []
    out = plgpu.kernel(
        functools.partial(_prefill_kernel, page_size=page_size, out_dtype=jnp.dtype(out_dtype or q.dtype), **options),
        out_type=jax.ShapeDtypeStruct(padded.shape, q.dtype),
        scratch_types=(
            plgpu.SMEM((2, HALF, head_dim), q.dtype, transforms=tiled),
            kv_tiles,
            kv_tiles,
            plgpu.Barrier(num_barriers=2),
            filled,
            filled,
            emptied,
            emptied,
            plgpu.Barrier(num_arrivals=2),
            *weights_smem,
        ),
        grid=(num_tiles, num_heads),
        grid_names=("tile", "head"),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )(padded, *kv, metadata.page_table, metadata.kv_lens, metadata.query_starts, plan.tiles, plan.first_rows, plan.end_rows)
    out = out[:num_tokens]
    return out if out_dtype in (None, q.dtype) else lax.bitcast_convert_type(out, out_dtype)


def _prefill_kernel(
    q_ref, keys_ref, values_ref, table_ref, lens_ref, starts_ref, tiles_ref, first_rows_ref, end_rows_ref,
    out_ref,
    q_smem, keys_smem, values_smem,
    q_ready, keys_ready, values_ready, keys_free, values_free, turn,
    weights_smem=None,
    *, scale: float, window: int | None, soft_cap: float | None, config: MosaicPrefillConfig, page_size: int, out_dtype: jnp.dtype,
):  # fmt: skip
    block_kv, stages = config.block_kv, config.num_stages
    num_heads, head_dim = q_ref.shape[1:]
    num_kv_heads = keys_ref.shape[1]
    pages_per_block, num_pages = block_kv // page_size, table_ref.shape[1]
    warpgroup = lax.axis_index("warpgroup")
    head = lax.axis_index("head")
    tile = tiles_ref[lax.axis_index("tile")]
    tile_start = tile * BLOCK_Q

    def span(row) -> RowSpan:
        return span_of_row(
            starts_ref[row], starts_ref[row + 1], lens_ref[row], tile_start, block_q=BLOCK_Q, block_kv=block_kv, window=window
        )

    first_row, end_row = first_rows_ref[tile], end_rows_ref[tile]

    @pl.when(warpgroup == 2)
    def _fetch():
        plgpu.set_max_registers(FETCH_REGISTERS, action="decrease")
        kv_head = lax.div(head, jnp.int32(num_heads // num_kv_heads))

        def fetch_row(row, count):
            part = span(row)

            def block(i, count):
                slot = lax.rem(count, jnp.int32(stages))
                for pages_ref, tiles, ready, free in (
                    (keys_ref, keys_smem, keys_ready, keys_free),
                    (values_ref, values_smem, values_ready, values_free),
                ):

                    @pl.when(count >= stages)
                    def _(free=free):
                        plgpu.barrier_wait(free.at[slot])

                    for p in range(pages_per_block):
                        page = table_ref[row, jnp.minimum(i * pages_per_block + p, num_pages - 1)]
                        plgpu.copy_gmem_to_smem(
                            pages_ref.at[page, kv_head], tiles.at[slot, pl.ds(p * page_size, page_size)], ready.at[slot]
                        )
                return count + 1

            return lax.fori_loop(part.begin, part.stop, block, count)

        count = lax.fori_loop(first_row, end_row, fetch_row, jnp.int32(0))
        for slot in range(stages):  # see every phase of a barrier out, as the interpreter demands

            @pl.when(slot < count)
            def _(slot=slot):
                plgpu.barrier_wait(keys_free.at[slot])
                plgpu.barrier_wait(values_free.at[slot])

    @pl.when(warpgroup < 2)
    def _compute():
        plgpu.set_max_registers(COMPUTE_REGISTERS[2], action="increase")
        wgmma = plgpu.Layout.WGMMA
        by_token = wgmma.reduce(1)
        token_start = tile_start + warpgroup * HALF
        plgpu.copy_gmem_to_smem(q_ref.at[pl.ds(token_start, HALF), head], q_smem.at[warpgroup], q_ready.at[warpgroup])
        plgpu.barrier_wait(q_ready.at[warpgroup])

        def take_turn():
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        def per_token(x, columns: int):
            return lax.broadcast_in_dim(x, (HALF, columns), [0])

        def full(shape, value, layout):
            return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

        def attend_row(row, carry):
            part = span(row)
            token = plgpu.broadcasted_iota(jnp.int32, (HALF,), 0, layout=by_token) + token_start
            latest = jnp.where((token >= part.start) & (token < part.end), token + part.offset, -1)

            def block(masked: bool, i, carry):
                total, maximum, weight, count = carry
                slot = lax.rem(count, jnp.int32(stages))
                plgpu.barrier_wait(keys_ready.at[slot])

                def qk(acc):
                    plgpu.wgmma(acc, q_smem.at[warpgroup], keys_smem.at[slot].transpose((1, 0)))
                    take_turn()
                    return acc[...]

                scores = pl.run_scoped(qk, plgpu.WGMMAAccumulatorRef((HALF, block_kv), jnp.float32))
                plgpu.barrier_arrive(keys_free.at[slot])
                unit = scale * math.log2(math.e)
                if soft_cap is not None:
                    scores, unit = soft_capped(scores, soft_cap, scale), 1.0
                if masked:  # after the unit: a fused multiply-add of a masked score and its rounded maximum would not cancel
                    scores, unit = scores * unit, 1.0
                    position = plgpu.broadcasted_iota(jnp.int32, (HALF, block_kv), 1, layout=wgmma) + i * block_kv
                    scores = jnp.where(position <= per_token(latest, block_kv), scores, MASKED)
                    if window is not None:
                        scores = jnp.where(position > per_token(latest - window, block_kv), scores, MASKED)
                new_maximum = jnp.maximum(maximum, scores.max(axis=1) * unit)
                decay = jnp.exp2(maximum - new_maximum)
                p = jnp.exp2(scores * unit - per_token(new_maximum, block_kv))
                total = total * per_token(decay, head_dim)
                weight = weight * decay + p.sum(axis=1)
                p = p.astype(q_smem.dtype)
                if weights_smem is None:
                    total, weight, new_maximum, p = lax.optimization_barrier((total, weight, new_maximum, p))
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(values_ready.at[slot])
                plgpu.barrier_wait(turn)
                if weights_smem is None:

                    def pv(acc):
                        plgpu.wgmma(acc, p, values_smem.at[slot])

                    total = pl.run_state(pv)(plgpu.WGMMAAccumulatorRef.init(total))
                else:
                    staged = weights_smem.at[warpgroup]
                    staged[...] = p
                    plgpu.commit_smem()

                    def pv_staged(acc):
                        plgpu.wgmma(acc, staged, values_smem.at[slot])
                        return acc[...]

                    total = total + pl.run_scoped(pv_staged, plgpu.WGMMAAccumulatorRef((HALF, head_dim), jnp.float32))
                plgpu.barrier_arrive(values_free.at[slot])
                return total, new_maximum, weight, count + 1

            if window is not None:
                carry = lax.fori_loop(part.begin, part.full_begin, functools.partial(block, True), carry)
            carry = lax.fori_loop(part.full_begin, part.full_end, functools.partial(block, False), carry)
            return lax.fori_loop(part.full_end, part.stop, functools.partial(block, True), carry)

        pl.when(warpgroup == 1)(take_turn)
        nothing = full((HALF, head_dim), 0.0, wgmma), full((HALF,), MASKED, by_token), full((HALF,), 0.0, by_token), jnp.int32(0)
        total, _, weight, _ = lax.fori_loop(first_row, end_row, attend_row, nothing)
        pl.when(warpgroup == 0)(take_turn)
        total = total / per_token(jnp.maximum(weight, 1e-30), head_dim)
        # The queries' memory takes the result: bits of its dtype under the name of theirs, until the caller renames them.
        total = total.astype(out_dtype)
        q_smem[warpgroup] = total if out_dtype == q_smem.dtype else lax.bitcast_convert_type(total, q_smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_smem.at[warpgroup], out_ref.at[pl.ds(token_start, HALF), head])
        plgpu.wait_smem_to_gmem(0)
