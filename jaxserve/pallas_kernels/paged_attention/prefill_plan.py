"""Which rows each tile of a step's tokens belongs to, and the order in which tiles start, computed on the device."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.pallas_kernels.metadata import AttentionMetadata


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PrefillPlan:
    """N tiles of the flat token axis; all arrays int32.

    Attributes:
        tiles: [N] tiles in the order in which they start: those that read most first, so that none is left over at the end.
        first_rows: [N] first row with a token in the tile (by tile, not by order); rows of one token are left to the decode kernel.
        end_rows: [N] one past the last.
    """

    tiles: jax.Array
    first_rows: jax.Array
    end_rows: jax.Array


def plan_prefill(metadata: AttentionMetadata, *, num_tokens: int, block_q: int) -> PrefillPlan:
    """Tiles of `block_q` tokens of an axis of `num_tokens`; a tile may hold tokens of several rows."""
    starts = metadata.query_starts
    total = starts[-1]
    tile = jnp.arange(-(-num_tokens // block_q), dtype=jnp.int32)
    num_rows = metadata.kv_lens.shape[0]
    row = jnp.arange(num_rows, dtype=jnp.int32)
    chunk = starts[1:] - starts[:-1] > 1
    first_chunk = jnp.min(jnp.where(chunk, row, num_rows))
    first = jnp.sum(starts[None, 1:] <= tile[:, None] * block_q, axis=1, dtype=jnp.int32)
    first = jnp.maximum(first, first_chunk)
    end = jnp.sum((starts[None, :-1] < (tile[:, None] + 1) * block_q) & (starts[None, :-1] < total), axis=1, dtype=jnp.int32)
    touched = chunk[None, :] & (row[None, :] >= first[:, None]) & (row[None, :] < end[:, None])
    last_token = jnp.minimum((tile[:, None] + 1) * block_q, starts[None, 1:])
    seen = metadata.kv_lens[None, :] - (starts[None, 1:] - last_token)
    work = jnp.sum(jnp.where(touched, seen, 0), axis=1, dtype=jnp.int32)
    earlier = (work[None, :] > work[:, None]) | ((work[None, :] == work[:, None]) & (tile[None, :] < tile[:, None]))
    rank = jnp.sum(earlier, axis=1, dtype=jnp.int32)
    order = jnp.sum(jnp.where(rank[None, :] == tile[:, None], tile[None, :], 0), axis=1, dtype=jnp.int32)
    return PrefillPlan(order, first, end)


class RowSpan(NamedTuple):
    """A row's part of one tile; scalars int32.

    Attributes:
        start, end: the row's tokens on the flat axis.
        offset: added to a token's index it gives its position.
        begin, stop: KV blocks that some token of the part sees; none for a row of one token.
        full_begin, full_end: those in between that all tokens of the tile see whole, so that nothing is masked; none where the
            tile holds other rows' tokens too.
    """

    start: jax.Array
    end: jax.Array
    offset: jax.Array
    begin: jax.Array
    full_begin: jax.Array
    full_end: jax.Array
    stop: jax.Array


def span_of_row(start, end, kv_len, tile_start, *, block_q: int, block_kv: int, window: int | None) -> RowSpan:
    """What a tile at `tile_start` needs of a row with tokens `start` to `end` and `kv_len` tokens in the cache."""
    size = jnp.int32(block_kv)
    offset = kv_len - end
    first, last = jnp.maximum(start, tile_start), jnp.minimum(end, tile_start + block_q) - 1
    begin = after_window = jnp.int32(0)
    if window is not None:
        begin = lax.div(jnp.maximum(first + offset - window + 1, 0), size)
        after_window = lax.div(jnp.maximum(last + offset - window + 1, 0) + size - 1, size)
    stop = jnp.where(end - start > 1, jnp.maximum(lax.div(last + offset + size, size), begin), begin)
    full_begin = jnp.clip(after_window, begin, stop)
    full_end = jnp.clip(lax.div(first + offset + 1, size), full_begin, stop)
    alone = last - first + 1 == block_q
    return RowSpan(start, end, offset, begin, full_begin, jnp.where(alone, full_end, full_begin), stop)
