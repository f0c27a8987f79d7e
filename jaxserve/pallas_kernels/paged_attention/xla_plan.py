"""The work of a step's attention in plain XLA, laid out on the device from the lengths, once for all layers of a KV group.

Rows of one token (decodes) share one list of items, each a block of one row's pages; a round takes as many items as there are
rows, so that a batch costs the sum of its lengths and not its longest. Longer rows (prefill chunks) are cut into tiles of
queries; each tile walks the blocks that it sees.

In a deterministic step all rows are cut into tiles, into smaller ones because most have one token: a tile walks its row's blocks one by one
from blocks' borders that do not move, and blocks that one of its queries does not see change nothing of it. Items of a round would be
added up with those of other rows.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.pallas_kernels.metadata import AttentionMetadata

BLOCK_TOKENS = 128  # keys of a block
TILE_TOKENS = 64  # queries of a tile
DETERMINISTIC_TILE_TOKENS = 16


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Items:
    """Blocks of the rows of one token; I of them at most, B pages each. All int32.

    Attributes:
        number: [] how many there are.
        rows: [I] the row of each; R for those that are not there.
        begins, ends: [I] keys begin <= key < end of the block are visible.
        pages: [I, B].
        tokens: [R] flat index of each row's token; out of range for a row of more or none.
    """

    number: jax.Array
    rows: jax.Array
    begins: jax.Array
    ends: jax.Array
    pages: jax.Array
    tokens: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tiles:
    """Queries of the longer rows, or of all. All int32.

    Attributes:
        number: [] how many there are.
        places: [tiles, 5] of each: row, flat index and position of its first token, first block, end of the blocks.
        blocks: [R, blocks, B] the page tables.
        size: static; queries of a tile.
    """

    number: jax.Array
    places: jax.Array
    blocks: jax.Array
    size: int = field(default=TILE_TOKENS, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class XlaPlan:
    """Items unless the step is deterministic, and tiles unless it is decode_only."""

    items: Items | None
    tiles: Tiles | None


def plan_xla(metadata: AttentionMetadata, *, page_size: int, window: int | None) -> XlaPlan:
    """Lay out the work of a step; a token sees the `window` latest positions, None: all."""
    num_rows, num_pages = metadata.page_table.shape
    block_pages = max(1, BLOCK_TOKENS // page_size)
    num_blocks = -(-num_pages // block_pages)
    padded = jnp.pad(metadata.page_table, ((0, 0), (0, num_blocks * block_pages - num_pages)))
    blocks = padded.reshape(num_rows, num_blocks, block_pages)
    lengths = jnp.minimum(metadata.kv_lens, 1) if metadata.decode_only else jnp.diff(metadata.query_starts)
    sizes = block_pages * page_size, window
    if metadata.deterministic:
        return XlaPlan(None, _plan_tiles(metadata, lengths, blocks, *sizes, shortest=1, tile_tokens=DETERMINISTIC_TILE_TOKENS))
    items = _plan_items(metadata, lengths, blocks, *sizes)
    if metadata.decode_only:
        return XlaPlan(items, None)
    return XlaPlan(items, _plan_tiles(metadata, lengths, blocks, *sizes, shortest=2, tile_tokens=TILE_TOKENS))


def _plan_items(metadata: AttentionMetadata, lengths: jax.Array, blocks: jax.Array, block_tokens: int, window: int | None) -> Items:
    num_rows, num_blocks, _ = blocks.shape
    kv_lens = jnp.where(lengths == 1, metadata.kv_lens, 0)
    first = jnp.zeros_like(kv_lens) if window is None else lax.div(jnp.maximum(kv_lens - window, 0), block_tokens)
    number, rows, places = _share_out(_ceil_div(kv_lens, block_tokens) - first, num_rows * num_blocks)
    row = jnp.minimum(rows, num_rows - 1)
    block = jnp.minimum(first[row] + places, num_blocks - 1)
    ends = kv_lens[row] - block * block_tokens
    return Items(
        number=number,
        rows=rows,
        begins=jnp.zeros_like(ends) if window is None else ends - window,
        ends=ends,
        pages=blocks[row, block],
        tokens=jnp.where(lengths == 1, metadata.query_starts[:-1], metadata.write_pages.shape[0]),
    )


def _plan_tiles(
    metadata: AttentionMetadata,
    lengths: jax.Array,
    blocks: jax.Array,
    block_tokens: int,
    window: int | None,
    *,
    shortest: int,
    tile_tokens: int,
) -> Tiles:
    """Tiles of the rows of at least `shortest` tokens."""
    num_rows, num_tokens = blocks.shape[0], metadata.write_pages.shape[0]
    most = num_rows + num_tokens // tile_tokens
    number, rows, places = _share_out(jnp.where(lengths >= shortest, _ceil_div(lengths, tile_tokens), 0), most)
    row = jnp.minimum(rows, num_rows - 1)
    done = places * tile_tokens  # tokens of the row before the tile
    position = (metadata.kv_lens - lengths)[row] + done
    first = jnp.zeros_like(position) if window is None else lax.div(jnp.maximum(position - window + 1, 0), block_tokens)
    end = _ceil_div(jnp.minimum(position + tile_tokens, metadata.kv_lens[row]), block_tokens)
    return Tiles(number, jnp.stack([row, metadata.query_starts[row] + done, position, first, end], axis=1), blocks, tile_tokens)


def _share_out(counts: jax.Array, most: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Number in one line the pieces of which each row has counts[row], `most` altogether at most.

    Returns:
        how many there are; [most] the row of each, R beyond the last; [most] its number within the row.
    """
    ends = jnp.cumsum(counts)
    piece = jnp.arange(most, dtype=jnp.int32)
    rows = jnp.sum(ends[None, :] <= piece[:, None], axis=1, dtype=jnp.int32)
    return ends[-1], rows, piece - (ends - counts)[jnp.minimum(rows, counts.shape[0] - 1)]


def _ceil_div(x: jax.Array, divisor: int) -> jax.Array:
    """Rounded up, of x >= 0; `//` would take several operations to care for signs."""
    return lax.div(x + (divisor - 1), jnp.full_like(x, divisor))
