"""Decode attention over a paged KV cache for sm_90 (Hopper), in Pallas Mosaic GPU.

A worker is a block of two warpgroups, one that fetches pages by TMA and one that computes, over a share of the plan (see decode_plan.py);
the fetching one runs ahead over the borders of rows, so that the memory never waits for a softmax. Scores are computed transposed,
K Qᵀ and Vᵀ Pᵀ: the 64 rows that a wgmma wants are then tokens, or head dimensions, and the few query heads of a KV head
are its narrow side.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxserve.pallas_kernels.layer_kv import LayerKV
from jaxserve.pallas_kernels.metadata import Queries
from jaxserve.pallas_kernels.mosaic import HEIGHT, see_out, swizzled
from jaxserve.pallas_kernels.paged_attention.combine import MASKED, combine_transposed
from jaxserve.pallas_kernels.paged_attention.decode_plan import DecodePlan, plan_decode
from jaxserve.pallas_kernels.paged_attention.triton_decode import soft_capped

_TILE_ROWS = 8  # of SMEM as wgmma reads it


@dataclass(frozen=True)
class MosaicDecodeConfig:
    """How the kernel is cut: KV tokens a block, blocks in flight a worker, workers of the whole grid."""

    block_kv: int = 64
    num_stages: int = 3
    num_workers: int = 132 * 2

    @staticmethod
    def goes(num_heads: int, num_kv_heads: int, head_dim: int, page_size: int) -> bool:
        """Whether the kernel computes these shapes at all."""
        return head_dim in (64, 128, 192, 256) and takes_pages(page_size) and num_heads // num_kv_heads <= HEIGHT

    @classmethod
    def suited(cls, q: Queries, kv: LayerKV, num_multiprocessors: int) -> "MosaicDecodeConfig | None":
        """`cut`, for q [R, H, D]; None where the kernel does not go or Triton's is faster."""
        _, num_kv_heads, page_size, head_dim = kv[0].shape
        num_rows, num_heads, _ = q.shape
        most_pairs = {192: 4, 256: 1}.get(head_dim, 0) * num_multiprocessors
        goes = cls.goes(num_heads, num_kv_heads, head_dim, page_size) and kv[0].dtype == q.dtype
        return cls.cut(head_dim, num_multiprocessors) if goes and num_rows * num_kv_heads <= most_pairs else None

    @classmethod
    def cut(cls, head_dim: int, num_multiprocessors: int) -> "MosaicDecodeConfig":
        """The cut measured best on an H200 (docs/performance_gpu.md)."""
        if head_dim > 128:
            return cls(HEIGHT, 3 if head_dim == 192 else 2, num_multiprocessors)
        return cls(2 * HEIGHT, 1, 2 * num_multiprocessors)

    def plan(self, kv_lens: jax.Array, num_kv_heads: int, window: int | None) -> DecodePlan:
        """The shares of a step, as `plan_decode`."""
        return plan_decode(kv_lens, num_kv_heads=num_kv_heads, block_kv=self.block_kv, window=window, num_workers=self.num_workers)


def takes_pages(page_size: int) -> bool:
    """Whether a page is whole tiles of SMEM, and a block whole pages."""
    return page_size % _TILE_ROWS == 0 and HEIGHT % page_size == 0


@functools.partial(jax.jit, static_argnames=("scale", "window", "soft_cap", "config", "out_dtype", "interpret"))
def decode_attention_mosaic(
    q: jax.Array,
    kv: LayerKV,
    page_table: jax.Array,
    kv_lens: jax.Array,
    *,
    plan: DecodePlan | None = None,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    config: MosaicDecodeConfig,
    out_dtype: jnp.dtype | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Attention of one token a row: q [R, H, D], page_table int32 [R, P], kv_lens int32 [R] -> [R, H, D]; zeros for a padding row.

    K and V are of q's type, bfloat16 or float16, the result of `out_dtype` (q's); D is a multiple of 64, block_kv of the page size.

    Args:
        plan: from the config's `plan`; None: made for this call.
    """
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads, page_size = kv[0].shape[1], kv[0].shape[2]
    group = num_heads // num_kv_heads
    block_kv, stages = config.block_kv, config.num_stages
    if plan is None:
        plan = config.plan(kv_lens, num_kv_heads, window)
    queries = _query_tiles(q, group, num_rows * num_kv_heads)
    lanes = queries.shape[1]
    kv_tiles = plgpu.SMEM((stages, block_kv, head_dim), kv[0].dtype, transforms=swizzled(head_dim, kv[0].dtype))
    filled = plgpu.Barrier(num_arrivals=block_kv // page_size, num_barriers=stages)
    emptied = plgpu.Barrier(num_barriers=stages)
    places = 2 * config.num_workers + num_rows * num_kv_heads
    sums, maxima, weights = plgpu.kernel(
        functools.partial(_decode_kernel, scale=scale, window=window, soft_cap=soft_cap, config=config, page_size=page_size),
        out_type=(
            jax.ShapeDtypeStruct((places, head_dim, lanes), jnp.float32),
            jax.ShapeDtypeStruct((places, lanes), jnp.float32),
            jax.ShapeDtypeStruct((places, lanes), jnp.float32),
        ),
        scratch_types=(
            plgpu.SMEM((2, lanes, head_dim), queries.dtype, transforms=swizzled(head_dim, queries.dtype)),
            kv_tiles,
            kv_tiles,
            plgpu.SMEM((lanes, block_kv), queries.dtype, transforms=swizzled(block_kv, queries.dtype)),
            plgpu.SMEM((2, lanes), jnp.float32),
            plgpu.Barrier(num_barriers=2),
            plgpu.Barrier(num_barriers=2),
            filled,
            filled,
            emptied,
            emptied,
        ),
        grid=(config.num_workers,),
        grid_names=("worker",),
        num_threads=2,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )(queries, *kv, page_table, kv_lens, plan.row_starts, plan.first_blocks, plan.worker_starts, plan.worker_rows)
    pairs_per_tile = num_rows * num_kv_heads // queries.shape[0]
    out = jax.ShapeDtypeStruct((num_rows, num_kv_heads, group, head_dim), out_dtype or q.dtype)
    return combine_transposed(out, sums, maxima, weights, plan, pairs_per_tile=pairs_per_tile, interpret=interpret).reshape(q.shape)


def _query_tiles(q: jax.Array, group: int, num_pairs: int) -> jax.Array:
    """[tiles, lanes, D]: a tile holds the query heads of one (row, KV head) pair, or of several where they fill it exactly."""
    if 8 % group == 0 and num_pairs * group % 8 == 0:
        return q.reshape(-1, 8, q.shape[-1])
    lanes = max(8, pl.next_power_of_2(group))
    return jnp.pad(q.reshape(num_pairs, group, q.shape[-1]), ((0, 0), (0, lanes - group), (0, 0)))


def _pairs(worker, num_kv_heads: int, row_starts_ref, worker_starts_ref, worker_rows_ref, visit, carry):
    """Call visit(row, head, begin, stop, blocks, carry) -> carry for each (row, KV head) of a worker's share."""
    end = worker_starts_ref[worker + 1]

    def pair(state):
        position, row, carry = state
        row_start, row_end = row_starts_ref[row], row_starts_ref[row + 1]
        blocks = lax.div(row_end - row_start, jnp.int32(num_kv_heads))
        head = lax.div(position - row_start, jnp.maximum(blocks, 1))
        begin = position - row_start - head * blocks
        stop = jnp.minimum(begin + end - position, blocks)
        carry = visit(row, head, begin, stop, blocks, carry)
        position += stop - begin
        return position, jnp.where(position == row_end, row + 1, row), carry

    state = worker_starts_ref[worker], worker_rows_ref[worker], carry
    return lax.while_loop(lambda state: state[0] < end, pair, state)[2]


def _decode_kernel(
    q_ref, keys_ref, values_ref, table_ref, lens_ref, row_starts_ref, first_blocks_ref, worker_starts_ref, worker_rows_ref,
    sums_ref, maxima_ref, weights_ref,
    q_smem, keys_smem, values_smem, p_smem, stats_smem,
    q_ready, q_free, keys_ready, values_ready, keys_free, values_free,
    *, scale: float, window: int | None, soft_cap: float | None, config: MosaicDecodeConfig, page_size: int,
):  # fmt: skip
    lanes, head_dim = q_ref.shape[1:]
    num_kv_heads = keys_ref.shape[1]
    pairs_per_tile = lens_ref.shape[0] * num_kv_heads // q_ref.shape[0]
    block_kv, stages = config.block_kv, config.num_stages
    pages_per_block, num_pages = block_kv // page_size, table_ref.shape[1]
    walk_pairs = functools.partial(_pairs, lax.axis_index("worker"), num_kv_heads, row_starts_ref, worker_starts_ref, worker_rows_ref)
    worker = lax.axis_index("worker")
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == 1)
    def _fetch():
        def visit(row, head, begin, stop, blocks, carry):
            del blocks
            count, pairs = carry
            q_slot = lax.rem(pairs, jnp.int32(2))

            @pl.when(pairs >= 2)
            def _():
                plgpu.barrier_wait(q_free.at[q_slot])

            tile = lax.div(row * num_kv_heads + head, jnp.int32(pairs_per_tile))
            plgpu.copy_gmem_to_smem(q_ref.at[tile], q_smem.at[q_slot], q_ready.at[q_slot])
            first = first_blocks_ref[row]

            def block(i, count):
                slot = lax.rem(count, jnp.int32(stages))
                pages = [table_ref[row, jnp.minimum((first + i) * pages_per_block + p, num_pages - 1)] for p in range(pages_per_block)]
                for pages_ref, tiles, ready, free in (
                    (keys_ref, keys_smem, keys_ready, keys_free),
                    (values_ref, values_smem, values_ready, values_free),
                ):

                    @pl.when(count >= stages)
                    def _(free=free):
                        plgpu.barrier_wait(free.at[slot])

                    for p, page in enumerate(pages):
                        plgpu.copy_gmem_to_smem(pages_ref.at[page, head], tiles.at[slot, pl.ds(p * page_size, page_size)], ready.at[slot])
                return count + 1

            return lax.fori_loop(begin, stop, block, count), pairs + 1

        count, pairs = walk_pairs(visit, (jnp.int32(0), jnp.int32(0)))
        for barriers, used in ((q_free, pairs), (keys_free, count), (values_free, count)):
            see_out(barriers, used)

    @pl.when(warpgroup == 0)
    def _compute():
        wgmma = plgpu.Layout.WGMMA
        by_head = wgmma.reduce(0)

        def per_head(x, rows: int):
            return lax.broadcast_in_dim(x, (rows, lanes), [1])

        def full(shape, value, layout):
            return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

        def visit(row, head, begin, stop, blocks, carry):
            count, pairs = carry
            q_slot = lax.rem(pairs, jnp.int32(2))
            kv_len = lens_ref[row]
            first = first_blocks_ref[row]
            plgpu.barrier_wait(q_ready.at[q_slot])

            def block(i, carry):
                total, maximum, weight, count = carry
                slot = lax.rem(count, jnp.int32(stages))
                plgpu.barrier_wait(keys_ready.at[slot])

                def qk(acc):
                    plgpu.wgmma(acc, keys_smem.at[slot], q_smem.at[q_slot].transpose((1, 0)))
                    return acc[...]

                scores = pl.run_scoped(qk, plgpu.WGMMAAccumulatorRef((block_kv, lanes), jnp.float32))
                plgpu.barrier_arrive(keys_free.at[slot])
                scores = soft_capped(scores, soft_cap, scale)
                token = plgpu.broadcasted_iota(jnp.int32, (block_kv, lanes), 0, layout=wgmma) + (first + i) * block_kv
                scores = jnp.where(token < kv_len, scores, MASKED)
                if window is not None:
                    scores = jnp.where(token >= kv_len - window, scores, MASKED)
                new_maximum = jnp.maximum(maximum, scores.max(axis=0))
                decay = jnp.exp2(maximum - new_maximum)
                p = jnp.exp2(scores - per_head(new_maximum, block_kv))
                p_smem.transpose((1, 0))[...] = p.astype(p_smem.dtype)
                weight = weight * per_head(decay, block_kv) + p
                plgpu.commit_smem()
                plgpu.barrier_wait(values_ready.at[slot])

                def pv(acc):
                    plgpu.wgmma(acc, values_smem.at[slot].transpose((1, 0)), p_smem.transpose((1, 0)))
                    return acc[...]

                product = pl.run_scoped(pv, plgpu.WGMMAAccumulatorRef((head_dim, lanes), jnp.float32))
                plgpu.barrier_arrive(values_free.at[slot])
                return total * per_head(decay, head_dim) + product, new_maximum, weight, count + 1

            nothing = full((head_dim, lanes), 0.0, wgmma), full((lanes,), MASKED, by_head), full((block_kv, lanes), 0.0, wgmma), count
            total, maximum, weight, count = lax.fori_loop(begin, stop, block, nothing)
            plgpu.barrier_arrive(q_free.at[q_slot])
            whole = 2 * config.num_workers + row * num_kv_heads + head
            place = jnp.where(stop - begin == blocks, whole, 2 * worker + jnp.where(begin == 0, 1, 0))
            sums_ref.at[place][...] = total
            plgpu.wait_smem_to_gmem(0)
            stats_smem[0] = maximum
            stats_smem[1] = weight.sum(axis=0)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(stats_smem.at[0], maxima_ref.at[place])
            plgpu.copy_smem_to_gmem(stats_smem.at[1], weights_ref.at[place])
            return count, pairs + 1

        walk_pairs(visit, (jnp.int32(0), jnp.int32(0)))
        plgpu.wait_smem_to_gmem(0)
