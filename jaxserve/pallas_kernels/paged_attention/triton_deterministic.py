"""Attention that gives a token the same bits alone, in a chunk and in any batch, for NVIDIA GPUs from sm_80 on, in Pallas-Triton.

One kernel for decodes and chunks alike: a token that was decoded once is part of a chunk after a preemption. A tile is always one
instruction high, and holds tokens of one row times the query heads of a KV head. It walks blocks that begin at fixed positions, within
splits that begin at fixed positions (see split_plan.py), one split or several, with an online softmax in each (FlashAttention-2,
https://arxiv.org/abs/2307.08691). A block that a token does not see changes nothing of it: its weights are zero, not small, and the sums so
far are multiplied by one. A second kernel adds up the splits that a token sees, in their order, with one split as with many.
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
from jaxserve.pallas_kernels.paged_attention.split_plan import SplitPlan, plan_splits, split_starts
from jaxserve.pallas_kernels.paged_attention.triton_decode import padded_lanes, soft_capped

_SPLIT_TOKENS = 256  # of the smallest splits; the memory of the partial results grows with their number
# From so many on chunks count more than decodes: tiles of 32 rows read keys and values half as often. They have the bits of 16: Triton lays
# both out alike, m16n8k16 with its four warps side by side over a block's tokens, once or twice. From 64 rows on it would take wgmma.
_MANY_TOKENS = 512
_ITEMS_A_WORKER = 2  # from so many on, splits of a tile are computed by one program, one after the other


@dataclass(frozen=True)
class DeterministicConfig:
    """How the kernel is cut.

    Attributes:
        block_kv: tokens a block.
        split_tokens: positions of the smallest splits, a multiple of it.
        num_warps, num_stages: of a program; Triton keeps two blocks in flight from 5 stages on, with fewer one, as pages are looked up.
        num_workers: programs.
        tile_lanes: rows of a tile, tokens times query heads of a KV head: 16, the smallest matrix instruction, or more.

    The first four decide bits: they may depend on the shapes of heads and cache and on nothing else, so not on the number of tokens.
    """

    block_kv: int = 64
    split_tokens: int = _SPLIT_TOKENS
    num_warps: int = 4
    num_stages: int = 3
    num_workers: int = 132 * 4
    tile_lanes: int = 16

    @classmethod
    def suited(cls, q: Queries, kv: LayerKV, num_multiprocessors: int) -> "DeterministicConfig":
        """By measurement on an H200 (docs/performance_gpu.md): with fewer stages Triton keeps one block in flight. For float8 it is the cut
        of the decode kernel (triton_decode.py).
        """
        block_kv = max(16, min(128, 64 * 128 // pl.next_power_of_2(q.shape[2])))
        if kv[0].dtype in FLOAT8:
            return cls(block_kv, _SPLIT_TOKENS, 1, 3, 8 * num_multiprocessors)
        if q.shape[0] >= _MANY_TOKENS:
            return cls(block_kv, _SPLIT_TOKENS, 4, 5, 2 * num_multiprocessors, tile_lanes=32)
        return cls(block_kv, _SPLIT_TOKENS, 4, 5, 3 * num_multiprocessors)

    def plan(self, metadata: AttentionMetadata, q: Queries, kv: LayerKV, window: int | None) -> SplitPlan:
        """Cut a step, once for all layers that have this shape of heads and cache, and this window."""
        num_kv_heads, page_size = kv[0].shape[1:3]
        heads = pl.next_power_of_2(q.shape[1] // num_kv_heads)  # lanes of a token
        return plan_splits(
            metadata,
            num_tokens=q.shape[0],
            tile_tokens=max(self.tile_lanes, heads) // heads,
            starts=split_starts(metadata.page_table.shape[1] * page_size, self.split_tokens),
            window=window,
            enough_items=pl.cdiv(_ITEMS_A_WORKER * self.num_workers, num_kv_heads),
        )


def deterministic_attention_triton(
    q: jax.Array,
    kv: LayerKV,
    metadata: AttentionMetadata,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    plan: SplitPlan,
    config: DeterministicConfig,
    out_dtype: jnp.dtype | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Bottom-right causal attention of each token over its row's pages: q [T, H, D] -> [T, H, D]; zeros for padding tokens.

    `plan` is the config's.

    A float8 cache is read as float16, which holds every float8 value. The result is of `out_dtype`, q's if not another one.
    """
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = kv[0].shape[1]
    group = num_heads // num_kv_heads
    partials = num_tokens, num_kv_heads, plan.most_splits, group
    shape = num_tokens, num_kv_heads, group, head_dim
    operands = q.reshape(shape), *kv, metadata.page_table, plan
    sums, maxima, weights = pl.pallas_call(
        functools.partial(_attend_kernel, scale=scale, window=window, soft_cap=soft_cap, config=config),
        grid=(config.num_workers,),
        in_specs=jax.tree.map(lambda _: pl.no_block_spec, operands),
        out_specs=(pl.no_block_spec,) * 3,
        out_shape=(
            jax.ShapeDtypeStruct((*partials, head_dim), jnp.float32),
            jax.ShapeDtypeStruct(partials, jnp.float32),
            jax.ShapeDtypeStruct(partials, jnp.float32),
        ),
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=interpret,
        name="paged_deterministic",
    )(*operands)
    operands = sums, maxima, weights, plan
    out = pl.pallas_call(
        _combine_kernel,
        grid=(num_tokens, num_kv_heads),
        in_specs=jax.tree.map(lambda _: pl.no_block_spec, operands),
        out_specs=pl.no_block_spec,
        out_shape=jax.ShapeDtypeStruct(shape, out_dtype or q.dtype),
        compiler_params=plt.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
        name="paged_deterministic_combine",
    )(*operands)
    return out.reshape(q.shape)


def _attend_kernel(
    q_ref, keys_ref, values_ref, table_ref, plan_refs: SplitPlan, sums_ref, maxima_ref, weights_ref,
    *, scale: float, window: int | None, soft_cap: float | None, config: DeterministicConfig,
):  # fmt: skip
    _, num_kv_heads, group, head_dim = q_ref.shape
    num_tiles = plan_refs.tile_rows.shape[0]
    heads = pl.next_power_of_2(group)
    lanes = max(config.tile_lanes, heads)
    page_size, pages, block_kv = keys_ref.shape[2], table_ref.shape[1], config.block_kv
    padded_dim = pl.next_power_of_2(head_dim)
    dim, column = padded_lanes(head_dim)
    lane = jnp.arange(lanes, dtype=jnp.int32)
    member = jnp.minimum(lane % heads, group - 1)
    worker = pl.program_id(0)

    def attend(row, head, start, position, size, split):
        """Online softmax over what a tile sees of a split: weighted values, maxima and weights of its lanes."""
        place = lane // heads
        q = q_ref[column(start + jnp.minimum(place, size - 1)), head, column(member), dim]
        unit = scale
        if padded_dim != head_dim:
            q = jnp.where(jnp.arange(padded_dim, dtype=jnp.int32)[None, :] < head_dim, q, jnp.zeros_like(q))
        if keys_ref.dtype in FLOAT8:
            q, unit = (q.astype(jnp.float32) * scale).astype(jnp.float16), 1.0
        latest = jnp.where(place < size, position + place, -1)

        def block(i, carry):
            total, maximum, weight = carry
            token = i * block_kv + jnp.arange(block_kv, dtype=jnp.int32)
            page = table_ref[row, jnp.minimum(token // page_size, pages - 1)]
            where = column(page), head, column(token % page_size), dim
            scores = soft_capped(plt.dot(q, keys_ref[where].astype(q.dtype).T), soft_cap, unit)
            visible = token[None, :] <= latest[:, None]
            if window is not None:
                visible &= token[None, :] > latest[:, None] - window
            scores = jnp.where(visible, scores, MASKED)
            new_maximum = jnp.maximum(maximum, scores.max(axis=1))
            decay = jnp.exp2(maximum - new_maximum)
            # Where nothing was visible yet the maximum is MASKED too, and exp2 gives one.
            exponentials = jnp.where(visible, jnp.exp2(scores - new_maximum[:, None]), 0.0)
            total = total * decay[:, None] + plt.dot(exponentials.astype(q.dtype), values_ref[where].astype(q.dtype))
            return total, new_maximum, weight * decay + exponentials.sum(axis=1)

        nothing = (
            jnp.zeros((lanes, padded_dim), jnp.float32),
            jnp.full((lanes,), MASKED, jnp.float32),
            jnp.zeros((lanes,), jnp.float32),
        )
        begin, end = plan_refs.starts[split], jnp.minimum(plan_refs.starts[split + 1], position + size)
        if window is not None:
            begin = jnp.maximum(begin, position - window + 1)
        return lax.fori_loop(begin // block_kv, pl.cdiv(end, block_kv), block, nothing)

    @pl.loop(0, pl.cdiv(plan_refs.num_items[0] * num_kv_heads - worker, config.num_workers))
    def _(i):
        number = worker + i * config.num_workers
        item, head = plan_refs.items[number // num_kv_heads], number % num_kv_heads
        tile, run = item % num_tiles, item // num_tiles
        start, position, size = plan_refs.tile_starts[tile], plan_refs.tile_positions[tile], plan_refs.tile_sizes[tile]
        row, first, run_splits = plan_refs.tile_rows[tile], plan_refs.first_splits[tile], plan_refs.run_splits[0]
        place, in_group = lane // heads, lane % heads
        present = (place < size) & (in_group < group)
        token = jnp.where(present, start + place, q_ref.shape[0])  # what is not written is out of bounds: so the interpreter drops it

        def wide(x):
            """[lanes] or [D] as a tile: stores with a mask want indices of its shape."""
            return jnp.broadcast_to(x, (lanes, padded_dim))

        @pl.loop(run * run_splits, jnp.minimum((run + 1) * run_splits, plan_refs.split_counts[tile]))
        def _(rank):
            total, maximum, weight = attend(row, head, start, position, size, first + rank)
            of_dim = wide(jnp.arange(padded_dim, dtype=jnp.int32)[None, :])
            where = wide(token[:, None]), head, rank, wide(in_group[:, None]), of_dim
            plt.store(sums_ref.at[where], total, mask=wide(present[:, None]) & (of_dim < head_dim))
            plt.store(maxima_ref.at[token, head, rank, in_group], maximum, mask=present)
            plt.store(weights_ref.at[token, head, rank, in_group], weight, mask=present)


def _combine_kernel(sums_ref, maxima_ref, weights_ref, plan_refs: SplitPlan, out_ref):
    _, _, group, head_dim = out_ref.shape
    token, head = pl.program_id(0), pl.program_id(1)
    dim, column = padded_lanes(head_dim)
    member = jnp.minimum(jnp.arange(pl.next_power_of_2(group), dtype=jnp.int32), group - 1)

    def add(rank, carry):
        total, maximum, weight = carry
        split_maximum = maxima_ref[token, head, rank, member]
        new_maximum = jnp.maximum(maximum, split_maximum)
        decay, share = jnp.exp2(maximum - new_maximum), jnp.exp2(split_maximum - new_maximum)
        total = total * decay[:, None] + sums_ref[token, head, rank, column(member), dim] * share[:, None]
        return total, new_maximum, weight * decay + weights_ref[token, head, rank, member] * share

    nothing = (
        jnp.zeros((member.size, pl.next_power_of_2(head_dim)), jnp.float32),
        jnp.full((member.size,), MASKED, jnp.float32),
        jnp.zeros((member.size,), jnp.float32),
    )
    first = plan_refs.token_ranks[token]
    total, _, weight = lax.fori_loop(first, first + plan_refs.token_counts[token], add, nothing)
    out_ref[token, head, column(member), dim] = (total / jnp.maximum(weight, 1e-30)[:, None]).astype(out_ref.dtype)
