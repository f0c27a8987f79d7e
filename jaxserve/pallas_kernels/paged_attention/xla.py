"""Paged attention in plain XLA: what runs where no kernel does, and on the CPU.

Loops whose lengths are known on the device only, over blocks of pages, with the running softmax of FlashAttention (Dao 2023,
arXiv 2307.08691): neither the width of the page tables nor a bucket's padding costs anything, and no score outlives its block.

- Rows of one token (decodes) share one list of work items, each a block of one row's pages; a round takes as many items as
  there are rows, so that a batch costs the sum of its lengths and not its longest.
- Longer rows (prefill chunks) are cut into tiles of queries; each tile walks the blocks that it sees.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.pallas_kernels.layer_kv import LayerKV
from jaxserve.pallas_kernels.metadata import AttentionMetadata

BLOCK_TOKENS = 128  # keys of a block
TILE_TOKENS = 64  # queries of a tile
MASKED = -1e30  # finite: the difference of two masked scores must not be NaN


class _Options(NamedTuple):
    scale: float
    window: int | None
    soft_cap: float | None


def paged_attention_xla(
    q: jax.Array, kv: LayerKV, metadata: AttentionMetadata, *, scale: float, window: int | None, soft_cap: float | None
) -> jax.Array:
    """Attention of each token over its row's pages. Shapes as in `paged_attention`."""
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, page_size = kv[0].shape[1:3]
    options = _Options(scale, window, soft_cap)
    grouped = q.reshape(num_tokens, num_kv_heads, num_heads // num_kv_heads, head_dim)
    table = _whole_blocks(metadata.page_table, max(1, BLOCK_TOKENS // page_size))
    if metadata.decode_only:
        out = _attend_single_tokens(grouped, kv, table, metadata.kv_lens, options)
    else:
        starts, lengths = metadata.query_starts[:-1], jnp.diff(metadata.query_starts)
        out = _attend_tiles(grouped, kv, table, metadata, options)
        single_lens = jnp.where(lengths == 1, metadata.kv_lens, 0)
        single = _attend_single_tokens(grouped[starts], kv, table, single_lens, options)
        out = out.at[jnp.where(lengths == 1, starts, num_tokens)].set(single, mode="drop", unique_indices=True)
    return out.reshape(num_tokens, num_heads, head_dim)


def _attend_single_tokens(q: jax.Array, kv: LayerKV, table: jax.Array, kv_lens: jax.Array, options: _Options) -> jax.Array:
    """One query a row, the row's last position. q [R, KH, G, D], kv_lens [R] with 0 for rows to leave out -> [R, KH, G, D]."""
    num_rows, num_kv_heads, group, head_dim = q.shape
    block_pages = table.shape[2]
    block_tokens = block_pages * kv[0].shape[2]
    first_blocks = jnp.zeros_like(kv_lens) if options.window is None else jnp.maximum(kv_lens - options.window, 0) // block_tokens
    num_blocks = -(-kv_lens // block_tokens) - first_blocks
    ends = jnp.cumsum(num_blocks)  # of each row's items in the list
    rows = jnp.arange(num_rows, dtype=jnp.int32)

    def attend_round(i: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        best, total, acc = state
        item = i * num_rows + rows
        belongs = (item[None, :] < ends[:, None]) & (item[None, :] >= (ends - num_blocks)[:, None])  # [row, item]
        row = jnp.minimum(jnp.searchsorted(ends, item, side="right").astype(jnp.int32), num_rows - 1)
        block = jnp.clip(first_blocks[row] + item - (ends - num_blocks)[row], 0, table.shape[1] - 1)
        keys, values = _gather_blocks(kv, table[row, block])
        scores = _scores(q[row], keys, options)  # [item, KH, G, S]
        position = block[:, None] * block_tokens + jnp.arange(block_tokens, dtype=jnp.int32)[None, :]
        visible = position < kv_lens[row][:, None]
        if options.window is not None:
            visible &= position >= (kv_lens[row] - options.window)[:, None]
        scores = jnp.where(visible[:, None, None, :], scores, MASKED)
        item_best = scores.max(axis=-1)
        weights = jnp.exp(scores - item_best[..., None])
        item_acc = _mix(weights, values)

        # Items of one row may meet in a round, so they are merged by a [row, item] matrix rather than each into its own state.
        of_row = belongs[:, :, None, None]
        new_best = jnp.maximum(best, jnp.where(of_row, item_best[None], MASKED).max(axis=1))
        share = jnp.where(of_row, jnp.exp(jnp.minimum(item_best[None] - new_best[:, None], 0.0)), 0.0)  # [row, item, KH, G]
        keep = jnp.exp(best - new_best)
        total = total * keep + (share * weights.sum(axis=-1)[None]).sum(axis=1)
        return new_best, total, acc * keep[..., None] + jnp.einsum("rikg,ikgd->rkgd", share, item_acc)

    num_rounds = -(-ends[-1] // num_rows)
    _, total, acc = lax.fori_loop(0, num_rounds, attend_round, _running_softmax((num_rows, num_kv_heads, group), head_dim))
    return _normalised(total, acc, q.dtype)


def _attend_tiles(q: jax.Array, kv: LayerKV, table: jax.Array, metadata: AttentionMetadata, options: _Options) -> jax.Array:
    """The rows of more than one token. q [T, KH, G, D] -> [T, KH, G, D], zeros for tokens of other rows."""
    num_tokens, num_kv_heads, group, head_dim = q.shape
    block_tokens = table.shape[2] * kv[0].shape[2]
    tile_tokens = min(TILE_TOKENS, num_tokens)
    starts, lengths = metadata.query_starts[:-1], jnp.diff(metadata.query_starts)
    num_tiles = jnp.where(lengths > 1, -(-lengths // tile_tokens), 0)
    ends = jnp.cumsum(num_tiles)
    padded = jnp.pad(q, ((0, tile_tokens), (0, 0), (0, 0), (0, 0)))  # a row's last tile may reach over the end
    offsets = jnp.arange(tile_tokens, dtype=jnp.int32)

    def attend_tile(i: jax.Array, out: jax.Array) -> jax.Array:
        row = jnp.searchsorted(ends, i, side="right").astype(jnp.int32)
        done = (i - (ends[row] - num_tiles[row])) * tile_tokens  # tokens of the row before this tile
        start = starts[row] + done
        first_position = metadata.kv_lens[row] - lengths[row] + done
        last_position = jnp.minimum(first_position + tile_tokens, metadata.kv_lens[row]) - 1
        tile = lax.dynamic_slice_in_dim(padded, start, tile_tokens)
        tile = tile.transpose(1, 2, 0, 3).reshape(1, num_kv_heads, group * tile_tokens, head_dim)

        def attend_block(b: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
            best, total, acc = state
            keys, values = _gather_blocks(kv, table[row, b][None])
            scores = _scores(tile, keys, options).reshape(1, num_kv_heads, group, tile_tokens, block_tokens)
            behind = (first_position + offsets)[:, None] - (b * block_tokens + jnp.arange(block_tokens, dtype=jnp.int32))[None, :]
            visible = behind >= 0
            if options.window is not None:
                visible &= behind < options.window
            scores = jnp.where(visible[None, None, None], scores, MASKED).reshape(1, num_kv_heads, group * tile_tokens, block_tokens)
            new_best = jnp.maximum(best, scores.max(axis=-1))
            weights = jnp.where(scores > MASKED, jnp.exp(scores - new_best[..., None]), 0.0)  # a window may mask all of a query's block
            keep = jnp.exp(best - new_best)
            return new_best, total * keep + weights.sum(axis=-1), acc * keep[..., None] + _mix(weights, values)

        first_block = 0 if options.window is None else jnp.maximum(first_position - options.window + 1, 0) // block_tokens
        state = _running_softmax((1, num_kv_heads, group * tile_tokens), head_dim)
        _, total, acc = lax.fori_loop(first_block, last_position // block_tokens + 1, attend_block, state)
        tile_out = _normalised(total, acc, q.dtype).reshape(num_kv_heads, group, tile_tokens, head_dim).transpose(2, 0, 1, 3)
        # What a tile writes past its row's end is overwritten by the next row's first tile, or is padding.
        return lax.dynamic_update_slice_in_dim(out, tile_out, start, axis=0)

    return lax.fori_loop(0, ends[-1], attend_tile, jnp.zeros_like(padded))[:num_tokens]


def _whole_blocks(page_table: jax.Array, block_pages: int) -> jax.Array:
    """[R, P] -> [R, blocks, block_pages], padded with page 0."""
    num_rows, num_pages = page_table.shape
    num_blocks = -(-num_pages // block_pages)
    padded = jnp.pad(page_table, ((0, 0), (0, num_blocks * block_pages - num_pages)))
    return padded.reshape(num_rows, num_blocks, block_pages)


def _gather_blocks(kv: LayerKV, pages: jax.Array) -> tuple[jax.Array, jax.Array]:
    """K and V of `pages` [N, block_pages] -> [N, KH, S, D]."""
    num_blocks, block_pages = pages.shape
    _, num_kv_heads, page_size, head_dim = kv[0].shape
    heads = jnp.arange(num_kv_heads, dtype=jnp.int32)
    tiles = (pages[:, None, :] * num_kv_heads + heads[None, :, None]).reshape(-1)

    def gather(x: jax.Array) -> jax.Array:
        rows = x.reshape(-1, page_size * head_dim).at[tiles].get(mode="promise_in_bounds")
        # Fused into the gather, the reshape would cost a division an element.
        return lax.optimization_barrier(rows).reshape(num_blocks, num_kv_heads, block_pages * page_size, head_dim)

    return gather(kv[0]), gather(kv[1])


def _scores(q: jax.Array, keys: jax.Array, options: _Options) -> jax.Array:
    """q [N, KH, M, D] times keys [N, KH, S, D] -> float32 [N, KH, M, S]."""
    scores = options.scale * jnp.einsum("nkmd,nksd->nkms", q, keys, preferred_element_type=jnp.float32)
    return scores if options.soft_cap is None else options.soft_cap * jnp.tanh(scores / options.soft_cap)


def _mix(weights: jax.Array, values: jax.Array) -> jax.Array:
    """weights [N, KH, M, S] times values [N, KH, S, D] -> float32 [N, KH, M, D]."""
    return jnp.einsum("nkms,nksd->nkmd", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)


def _running_softmax(shape: tuple[int, ...], head_dim: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Nothing seen yet: the best score, the sum of weights relative to it, the weighted sum of values."""
    return jnp.full(shape, MASKED, jnp.float32), jnp.zeros(shape, jnp.float32), jnp.zeros((*shape, head_dim), jnp.float32)


def _normalised(total: jax.Array, acc: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The softmax's result; zero where nothing was visible."""
    return (acc / jnp.where(total == 0.0, 1.0, total)[..., None]).astype(dtype)
