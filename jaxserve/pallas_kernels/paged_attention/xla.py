"""Paged attention in plain XLA: what runs where no kernel does, and on the CPU.

Loops whose lengths are known on the device only, over blocks of pages, with the running softmax of FlashAttention (Dao 2023,
arXiv 2307.08691): neither the width of the page tables nor a bucket's padding costs anything, and no score outlives its block.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.pallas_kernels.layer_kv import LayerKV, from_pages
from jaxserve.pallas_kernels.paged_attention.xla_plan import Items, Tiles, XlaPlan

MASKED = -1e30  # finite: the difference of two masked scores must not be NaN

Softmax = tuple[jax.Array, jax.Array, jax.Array]
"""Running: the best score, the sum of weights relative to it, the sum of values weighted so."""


class _Options(NamedTuple):
    scale: float
    window: int | None
    soft_cap: float | None
    out_dtype: jnp.dtype


def paged_attention_xla(
    q: jax.Array,
    kv: LayerKV,
    plan: XlaPlan,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    out_dtype: jnp.dtype | None = None,
) -> jax.Array:
    """Attention of each token over its row's pages. Shapes as in `paged_attention`, what the rows are says the plan."""
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = kv[0].shape[1]
    options = _Options(scale, window, soft_cap, jnp.dtype(out_dtype or q.dtype))
    grouped = q.reshape(num_tokens, num_kv_heads, num_heads // num_kv_heads, head_dim)
    if plan.items is None:
        assert plan.tiles is not None
        out = _attend_tiles(grouped, kv, plan.tiles, options)
    elif plan.tiles is None:
        out = _attend_items(grouped, kv, plan.items, options)
    else:
        out = _attend_tiles(grouped, kv, plan.tiles, options)
        single = _attend_items(grouped.at[plan.items.tokens].get(mode="clip"), kv, plan.items, options)
        out = out.at[plan.items.tokens].set(single, mode="drop", unique_indices=True)
    return out.reshape(num_tokens, num_heads, head_dim)


def _attend_items(q: jax.Array, kv: LayerKV, items: Items, options: _Options) -> jax.Array:
    """Rows of one token: q [R, KH, G, D] -> [R, KH, G, D], zeros for the other rows."""
    num_rows, num_kv_heads, group, head_dim = q.shape
    key = jnp.arange(items.pages.shape[1] * kv[0].shape[2], dtype=jnp.int32)[None, :]
    row = jnp.arange(num_rows, dtype=jnp.int32)[:, None]

    def attend_round(i: jax.Array, state: Softmax) -> Softmax:
        best, total, acc = state
        begin = i * num_rows
        rows, ends, pages = (_slice(x, begin, num_rows) for x in (items.rows, items.ends, items.pages))
        keys, values = _gather_blocks(kv, pages, q.dtype)
        scores = _scores(q.at[rows].get(mode="clip"), keys, options)  # [item, KH, G, S]
        visible = key < ends[:, None]
        if options.window is not None:
            visible &= key >= _slice(items.begins, begin, num_rows)[:, None]
        scores = jnp.where(visible[:, None, None, :], scores, MASKED)
        item_best = scores.max(axis=-1)
        weights = jnp.exp(scores - item_best[..., None])
        # Items of one row may meet in a round: they are merged by a [row, item] matrix and not each into its row's state.
        belongs = (rows[None, :] == row)[:, :, None, None]
        bests = jnp.where(belongs, item_best[None], MASKED)
        new_best = jnp.maximum(best, bests.max(axis=1))
        share = jnp.where(belongs, jnp.exp(bests - new_best[:, None]), 0.0)  # [row, item, KH, G]
        keep = jnp.exp(best - new_best)
        total = total * keep + (share * weights.sum(axis=-1)[None]).sum(axis=1)
        return new_best, total, acc * keep[..., None] + jnp.einsum("rikg,ikgd->rkgd", share, _mix(weights, values))

    num_rounds = lax.div(items.number + (num_rows - 1), jnp.int32(num_rows))
    return _normalised(
        lax.fori_loop(0, num_rounds, attend_round, _softmax_start((num_rows, num_kv_heads, group), head_dim)), options.out_dtype
    )


def _attend_tiles(q: jax.Array, kv: LayerKV, tiles: Tiles, options: _Options) -> jax.Array:
    """Rows of several tokens, or all: q [T, KH, G, D] -> [T, KH, G, D], zeros for other rows' tokens, or what a neighbour's tile left."""
    num_tokens, num_kv_heads, group, head_dim = q.shape
    block_tokens = tiles.blocks.shape[2] * kv[0].shape[2]
    shape = (1, num_kv_heads, group * tiles.size)
    # A row's last tile may reach over the end.
    padded = jnp.pad(q, ((0, tiles.size), (0, 0), (0, 0), (0, 0)))
    ahead = jnp.arange(tiles.size, dtype=jnp.int32)[:, None] - jnp.arange(block_tokens, dtype=jnp.int32)[None, :]

    def attend_tile(i: jax.Array, out: jax.Array) -> jax.Array:
        row, start, position, first_block, end_block = _slice(tiles.places, i, 1)[0]
        queries = _slice(padded, start, tiles.size).transpose(1, 2, 0, 3).reshape(*shape, head_dim)
        row_blocks = _slice(tiles.blocks, row, 1)[0]

        def attend_block(b: jax.Array, state: Softmax) -> Softmax:
            best, total, acc = state
            keys, values = _gather_blocks(kv, _slice(row_blocks, b, 1), q.dtype)
            behind = ahead + (position - b * block_tokens)  # positions from key to query
            visible = behind >= 0
            if options.window is not None:
                visible &= behind < options.window
            scores = _scores(queries, keys, options).reshape(num_kv_heads, group, tiles.size, block_tokens)
            scores = jnp.where(visible[None, None], scores, MASKED).reshape(*shape, block_tokens)
            new_best = jnp.maximum(best, scores.max(axis=-1))
            weights = jnp.exp(scores - new_best[..., None])
            if options.window is not None:
                weights = jnp.where(scores > MASKED, weights, 0.0)  # of a block that a query does not see at all
            keep = jnp.exp(best - new_best)
            return new_best, total * keep + weights.sum(axis=-1), acc * keep[..., None] + _mix(weights, values)

        state = lax.fori_loop(first_block, end_block, attend_block, _softmax_start(shape, head_dim))
        tile_out = _normalised(state, options.out_dtype).reshape(num_kv_heads, group, tiles.size, head_dim).transpose(2, 0, 1, 3)
        # What a tile writes past its row's end is written again by the tile or the item that it belongs to, or is padding.
        return lax.dynamic_update_slice_in_dim(out, tile_out, start, axis=0, allow_negative_indices=False)

    return lax.fori_loop(0, tiles.number, attend_tile, jnp.zeros(padded.shape, options.out_dtype))[:num_tokens]


def _gather_blocks(kv: LayerKV, pages: jax.Array, dtype: jnp.dtype) -> LayerKV:
    """K and V of `pages` [N, B] -> [N, KH, S, D]; those of 8 bits in `dtype`."""
    num_blocks, block_pages = pages.shape
    _, num_kv_heads, page_size, head_dim = kv[0].shape
    heads = jnp.arange(num_kv_heads, dtype=jnp.int32)
    tiles = (pages[:, None, :] * num_kv_heads + heads[None, :, None]).reshape(-1)

    def gather(x: jax.Array) -> jax.Array:
        rows = x.reshape(-1, page_size * head_dim).at[tiles].get(mode="promise_in_bounds", wrap_negative_indices=False)
        # Fused into the gather, the reshape would cost a division an element.
        block = lax.optimization_barrier(rows).reshape(num_blocks, num_kv_heads, block_pages * page_size, head_dim)
        return from_pages(block, dtype)

    return gather(kv[0]), gather(kv[1])


def _scores(q: jax.Array, keys: jax.Array, options: _Options) -> jax.Array:
    """q [N, KH, M, D] times keys [N, KH, S, D] -> float32 [N, KH, M, S]."""
    scores = options.scale * jnp.einsum("nkmd,nksd->nkms", q, keys, preferred_element_type=jnp.float32)
    return scores if options.soft_cap is None else options.soft_cap * jnp.tanh(scores / options.soft_cap)


def _mix(weights: jax.Array, values: jax.Array) -> jax.Array:
    """weights [N, KH, M, S] times values [N, KH, S, D] -> float32 [N, KH, M, D]."""
    return jnp.einsum("nkms,nksd->nkmd", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)


def _softmax_start(shape: tuple[int, ...], head_dim: int) -> Softmax:
    return jnp.full(shape, MASKED, jnp.float32), jnp.zeros(shape, jnp.float32), jnp.zeros((*shape, head_dim), jnp.float32)


def _normalised(state: Softmax, dtype: jnp.dtype) -> jax.Array:
    """The softmax's result; zero where nothing was visible."""
    _, total, acc = state
    return (acc / jnp.where(total == 0.0, 1.0, total)[..., None]).astype(dtype)


def _slice(x: jax.Array, start: jax.Array, size: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(x, start, size, allow_negative_indices=False)
