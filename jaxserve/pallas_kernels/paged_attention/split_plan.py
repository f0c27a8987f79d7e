"""Dividing a step into tiles of tokens and splits of positions, on the device, so that no token's sums depend on the rest of the step.

A tile holds tokens of one row. A split is a range of positions that every row has at the same place (`split_starts`). So which keys are
added up together, and in which order, follows from a token's position alone. How many splits of a tile are computed one after the other
depends on how much there is to do, and changes no sum.
"""

from bisect import bisect_right
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.pallas_kernels.metadata import AttentionMetadata

_EVEN_SPLITS = 4  # of the smallest size; then there are two for each doubling of the position


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SplitPlan:
    """N tiles of T tokens, S splits of a tile at most; all arrays int32.

    Attributes:
        num_items: [1] how many items there are.
        items: [S * N] of each, run * N + tile: it is so many runs behind the tile's first. Ordered by runs: the first ones of all tiles
            are whole, the last ones are of any length.
        run_splits: [1] splits of a run; a tile's last run may have fewer.
        starts: [splits of the longest row + 1] position at which each split begins, and where the last one ends.
        tile_rows, tile_starts, tile_positions, tile_sizes: [N] row, flat index and position of a tile's first token, number of its tokens.
        first_splits, split_counts: [N] first split that some token of the tile sees, and how many they see.
        token_ranks, token_counts: [T] the first split that a token sees, counted from its tile's first one, and how many it sees; 0 for
            padding.
    """

    num_items: jax.Array
    items: jax.Array
    run_splits: jax.Array
    starts: jax.Array
    tile_rows: jax.Array
    tile_starts: jax.Array
    tile_positions: jax.Array
    tile_sizes: jax.Array
    first_splits: jax.Array
    split_counts: jax.Array
    token_ranks: jax.Array
    token_counts: jax.Array

    @property
    def most_splits(self) -> int:
        """S."""
        return self.items.shape[0] // self.tile_rows.shape[0]


def split_starts(longest: int, smallest: int) -> tuple[int, ...]:
    """Where splits begin in a row of `longest` tokens, from position 0 on, and where the last one ends.

    Short rows are cut finely, for there may be few to keep a GPU busy; of long ones the splits are so large that there are few of them.
    """
    starts = [0]
    while starts[-1] < longest:
        number = len(starts) - 1
        starts.append(starts[-1] + (smallest if number < _EVEN_SPLITS else smallest << (1 + (number - _EVEN_SPLITS) // 2)))
    return tuple(starts)


def _most_splits(starts: tuple[int, ...], tile_tokens: int, window: int | None) -> int:
    """Most splits that a tile's tokens see."""
    if window is None:
        return len(starts) - 1
    earliest = (max(0, start - tile_tokens + 2 - window) for start in starts[:-1])  # of tiles whose last token is a split's first
    return max(number - bisect_right(starts, position) + 2 for number, position in enumerate(earliest))


def plan_splits(
    metadata: AttentionMetadata,
    *,
    num_tokens: int,
    tile_tokens: int,
    starts: tuple[int, ...],
    window: int | None,
    enough_items: int,
) -> SplitPlan:
    """Cut a step.

    Args:
        num_tokens: of the step.
        tile_tokens: of a tile at most.
        starts: `split_starts`.
        window: as in `paged_attention`.
        enough_items: more than so many are not made of one split each.
    """
    begins, ends = metadata.query_starts[:-1], metadata.query_starts[1:]
    num_rows = begins.shape[0]
    row_tiles = (ends - begins + tile_tokens - 1) // tile_tokens
    tile_ends = jnp.cumsum(row_tiles)

    def split_of(position: jax.Array) -> jax.Array:
        inner = np.asarray(starts[1:-1], np.int32)
        return jnp.sum(position[:, None] >= inner[None, :], axis=1, dtype=jnp.int32)

    def first_split(position: jax.Array) -> jax.Array:
        return jnp.zeros_like(position) if window is None else split_of(position - window + 1)

    tile = jnp.arange(num_rows + num_tokens // tile_tokens, dtype=jnp.int32)
    row = jnp.minimum(jnp.sum(tile_ends[None, :] <= tile[:, None], axis=1, dtype=jnp.int32), num_rows - 1)
    start = begins[row] + (tile - (tile_ends - row_tiles)[row]) * tile_tokens
    size = jnp.where(tile < tile_ends[-1], jnp.minimum(ends[row] - start, tile_tokens), 0)
    position = metadata.kv_lens[row] - ends[row] + start
    first = first_split(position)
    count = jnp.where(size > 0, split_of(position + size - 1) - first + 1, 0)
    run_splits = jnp.maximum(jnp.sum(count, dtype=jnp.int32) // enough_items, 1)

    run = jnp.arange(_most_splits(starts, tile_tokens, window), dtype=jnp.int32)
    there = (run * run_splits)[:, None] < count[None, :]
    of_run = jnp.sum(there, axis=1, dtype=jnp.int32)
    place = (jnp.cumsum(of_run) - of_run)[:, None] + jnp.cumsum(there, axis=1, dtype=jnp.int32) - 1
    item = jnp.arange(there.size, dtype=jnp.int32)
    items = jnp.zeros_like(item).at[jnp.where(there, place, item.size).reshape(-1)].set(item, mode="drop")

    token = jnp.arange(num_tokens, dtype=jnp.int32)
    token_row = jnp.minimum(jnp.sum(ends[None, :] <= token[:, None], axis=1, dtype=jnp.int32), num_rows - 1)
    token_tile = (tile_ends - row_tiles)[token_row] + (token - begins[token_row]) // tile_tokens
    token_position = metadata.kv_lens[token_row] - ends[token_row] + token
    token_first = first_split(token_position)
    real = token < ends[-1]
    return SplitPlan(
        num_items=jnp.sum(of_run, dtype=jnp.int32)[None],
        items=items,
        run_splits=run_splits[None],
        starts=jnp.asarray(starts, jnp.int32),
        tile_rows=row,
        tile_starts=start,
        tile_positions=position,
        tile_sizes=size,
        first_splits=first,
        split_counts=count,
        token_ranks=jnp.where(real, token_first - first.at[token_tile].get(mode="clip"), 0),
        token_counts=jnp.where(real, split_of(token_position) - token_first + 1, 0),
    )
