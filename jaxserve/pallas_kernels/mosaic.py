"""What the kernels in Pallas Mosaic GPU share: tiles in SMEM, and slots there that one warpgroup fills by TMA and others empty.

Fetches are counted from 0 over all that a block of threads does; the slot of a fetch is its number modulo how many slots there are.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

HEIGHT = 64  # of a wgmma
BY_ROW = plgpu.Layout.WGMMA.reduce(1)  # of one value for each row of a wgmma's sums
FETCH_REGISTERS = 40
COMPUTE_REGISTERS = {2: 232, 3: 152}  # by the warpgroups that compute: of 512 a thread of four warpgroups' place


def swizzled(columns: int, dtype: jnp.dtype) -> tuple[plgpu.TilingTransform, plgpu.SwizzleTransform]:
    """Transforms of a tile in SMEM of rows of `columns` elements (a multiple of 64 bytes), as wgmma and TMA want them."""
    width = min(128, columns * jnp.dtype(dtype).itemsize)
    tiling = plgpu.TilingTransform((8, width // jnp.dtype(dtype).itemsize))  # pyright: ignore[reportAbstractUsage]
    return tiling, plgpu.SwizzleTransform(width)  # pyright: ignore[reportAbstractUsage]


def lane_semantics(approx_math: bool = False) -> plgpu.CompilerParams:
    """Of a kernel that lowers in half the time of the default's semantics, which infer layouts first."""
    return plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane, approx_math=approx_math)


def even_workers(chunks: int, most: int) -> int:
    """The fewest blocks of threads that are done with their chunks in as many rounds as `most` of them would be."""
    return pl.cdiv(chunks, pl.cdiv(chunks, most))


def empty_slot(emptied: jax.Ref, count: jax.Array) -> jax.Array:
    """The slot of a fetch, int32, once all who read what was there are done.

    Args:
        emptied: a barrier a slot.
        count: the fetch's number, int32.
    """
    slots = emptied.shape[0]
    slot = lax.rem(count, jnp.int32(slots))

    @pl.when(count >= slots)
    def _():
        plgpu.barrier_wait(emptied.at[slot])

    return slot


def filled_slot(filled: jax.Ref, count: jax.Array) -> jax.Array:
    """The slot of a fetch, int32, once it is there; arguments as `empty_slot`'s."""
    slot = lax.rem(count, jnp.int32(filled.shape[0]))
    plgpu.barrier_wait(filled.at[slot])
    return slot


def see_out(emptied: jax.Ref, count: jax.Array) -> None:
    """Wait until all `count` fetches were read: every phase of a barrier must be seen, the interpreter demands it, and clusters do."""
    for slot in range(emptied.shape[0]):

        @pl.when(slot < count)
        def _(slot=slot):
            plgpu.barrier_wait(emptied.at[slot])


def place_in_panel(chunk: jax.Array, panel: jax.Array, per_tile: jax.Array, tiles: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where a chunk lies if panels of tiles of tokens are walked one after the other, each of them rows by rows.

    Args:
        chunk: its number, int32 as all of these.
        panel: tiles of tokens that are walked together; the last panel may have fewer.
        per_tile: chunks of a tile of tokens.
        tiles: of tokens.

    Returns:
        its tile of tokens, and which of the tile's chunks it is.
    """
    first = lax.div(chunk, panel * per_tile) * panel
    within, across = chunk - first * per_tile, jnp.minimum(panel, tiles - first)
    which = lax.div(within, across)
    return first + lax.rem(within, across), which
