"""Dividing a step into tiles of tokens and splits of positions, on the device, so that no token's sums depend on the rest of the step.

A tile holds tokens of one row. A split is a range of positions that every row has at the same place: split s begins at position
s * split_tokens. So which keys are added up together, and in which order, follows from a token's position alone.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels.metadata import AttentionMetadata


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SplitPlan:
    """N tiles of T tokens, S splits of a tile at most; all arrays int32.

    Attributes:
        num_items: [1] how many (tile, split) pairs there are.
        items: [S * N] of each, rank * N + tile: it is the tile's split number first_splits[tile] + rank. Ordered by rank: the first
            splits of all tiles are whole, the last ones are of any length.
        tile_rows, tile_starts, tile_positions, tile_sizes: [N] row, flat index and position of a tile's first token, number of its tokens.
        first_splits: [N] first split that some token of the tile sees.
        token_tiles: [T] tile of each token; any for padding.
        token_positions: [T] position of each token; -1 for padding.
    """

    num_items: jax.Array
    items: jax.Array
    tile_rows: jax.Array
    tile_starts: jax.Array
    tile_positions: jax.Array
    tile_sizes: jax.Array
    first_splits: jax.Array
    token_tiles: jax.Array
    token_positions: jax.Array


def plan_splits(
    metadata: AttentionMetadata, *, num_tokens: int, tile_tokens: int, split_tokens: int, most_splits: int, window: int | None
) -> SplitPlan:
    """Cut a step of `num_tokens` into tiles of at most `tile_tokens`, of which none sees more than `most_splits` splits."""
    starts, ends = metadata.query_starts[:-1], metadata.query_starts[1:]
    num_rows = starts.shape[0]
    row_tiles = (ends - starts + tile_tokens - 1) // tile_tokens
    tile_ends = jnp.cumsum(row_tiles)

    tile = jnp.arange(num_rows + num_tokens // tile_tokens, dtype=jnp.int32)
    row = jnp.minimum(jnp.sum(tile_ends[None, :] <= tile[:, None], axis=1, dtype=jnp.int32), num_rows - 1)
    start = starts[row] + (tile - (tile_ends - row_tiles)[row]) * tile_tokens
    size = jnp.where(tile < tile_ends[-1], jnp.minimum(ends[row] - start, tile_tokens), 0)
    position = metadata.kv_lens[row] - ends[row] + start
    first = first_split(position, split_tokens, window)
    count = jnp.where(size > 0, (position + size - 1) // split_tokens - first + 1, 0)

    rank = jnp.arange(most_splits, dtype=jnp.int32)
    there = rank[:, None] < count[None, :]
    of_rank = jnp.sum(there, axis=1, dtype=jnp.int32)
    place = (jnp.cumsum(of_rank) - of_rank)[:, None] + jnp.cumsum(there, axis=1, dtype=jnp.int32) - 1
    item = jnp.arange(there.size, dtype=jnp.int32)
    items = jnp.zeros_like(item).at[jnp.where(there, place, item.size).reshape(-1)].set(item, mode="drop")

    token = jnp.arange(num_tokens, dtype=jnp.int32)
    token_row = jnp.minimum(jnp.sum(ends[None, :] <= token[:, None], axis=1, dtype=jnp.int32), num_rows - 1)
    real = token < ends[-1]
    token_tile = jnp.where(real, (tile_ends - row_tiles)[token_row] + (token - starts[token_row]) // tile_tokens, 0)
    token_position = jnp.where(real, metadata.kv_lens[token_row] - ends[token_row] + token, -1)
    return SplitPlan(jnp.sum(count, dtype=jnp.int32)[None], items, row, start, position, size, first, token_tile, token_position)


def first_split(position: jax.Array, split_tokens: int, window: int | None) -> jax.Array:
    """First split that a token at a position sees; int32 of any shape, as the position."""
    return jnp.zeros_like(position) if window is None else jnp.maximum(position - window + 1, 0) // split_tokens
