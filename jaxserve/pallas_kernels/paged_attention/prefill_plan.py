"""Which rows each tile of a step's tokens belongs to, and the order in which tiles start, computed on the device."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels.metadata import AttentionMetadata


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PrefillPlan:
    """N tiles of the flat token axis; all arrays int32.

    Attributes:
        tiles: [N] tiles in the order in which they start: those that read most first, so that none is left over at the end.
        first_rows: [N] first row with a token in the tile (by tile, not by order).
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
    first = jnp.sum(starts[None, 1:] <= tile[:, None] * block_q, axis=1, dtype=jnp.int32)
    end = jnp.sum((starts[None, :-1] < (tile[:, None] + 1) * block_q) & (starts[None, :-1] < total), axis=1, dtype=jnp.int32)
    row = jnp.arange(metadata.kv_lens.shape[0], dtype=jnp.int32)
    touched = (row[None, :] >= first[:, None]) & (row[None, :] < end[:, None])
    last_token = jnp.minimum((tile[:, None] + 1) * block_q, starts[None, 1:])
    seen = metadata.kv_lens[None, :] - (starts[None, 1:] - last_token)
    work = jnp.sum(jnp.where(touched, seen, 0), axis=1, dtype=jnp.int32)
    earlier = (work[None, :] > work[:, None]) | ((work[None, :] == work[:, None]) & (tile[None, :] < tile[:, None]))
    rank = jnp.sum(earlier, axis=1, dtype=jnp.int32)
    order = jnp.sum(jnp.where(rank[None, :] == tile[:, None], tile[None, :], 0), axis=1, dtype=jnp.int32)
    return PrefillPlan(order, first, end)
