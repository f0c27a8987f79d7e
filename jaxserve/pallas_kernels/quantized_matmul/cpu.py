"""The product with a PlainWeight: on a CPU in tiles of rows, still in the cache as float32 when they are multiplied."""

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels.matmul.api import SWAPPED_TOKENS
from jaxserve.pallas_kernels.quantized_matmul.plain import PlainWeight

# By benchmarks/quantized_cpu.py on 2 cores with 1 MB of second-level cache each. In a loop XLA keeps a tile's elements in memory that it
# writes anew; outside of one it is up to eight times slower.
_TILE_ELEMENTS = 512 * 1024
_FEWEST_TILES = 2


def plain_matmul(x: jax.Array, weight: PlainWeight, out_dtype: jnp.dtype) -> jax.Array:
    """As `quantized_matmul`."""
    size, depth = weight.shape
    tile = _tile_rows(size, depth)
    count, rest = divmod(size, tile)
    wide = x.astype(jnp.float32)
    grouped = wide.reshape(x.shape[0], weight.scales.shape[1], -1)
    columns = [part.reshape(x.shape[0], -1) for part in jnp.split(grouped, weight.planes, axis=2)]
    sums = None if weight.minima is None else grouped.sum(axis=2)

    def product(part: PlainWeight) -> jax.Array:
        y = _dot(columns[0], part.scaled(0))
        for plane in range(1, part.planes):
            y = y + _dot(columns[plane], part.scaled(plane))
        return y if sums is None or part.minima is None else y + _dot(sums, part.minima.astype(jnp.float32))

    tiled = jax.lax.map(product, jax.tree.map(lambda a: a[: count * tile].reshape(count, tile, -1), weight))
    y = jnp.moveaxis(tiled, 0, 1).reshape(x.shape[0], -1)
    if rest:
        y = jnp.concatenate([y, product(jax.tree.map(lambda a: a[count * tile :], weight))], axis=1)
    return y.astype(out_dtype)


def _tile_rows(size: int, depth: int) -> int:
    """Rows of a tile: as many as fit, of the sizes that leave no rest if one of them is not much smaller."""
    most = max(min(_TILE_ELEMENTS // depth, size // _FEWEST_TILES), 1)
    return next((rows for rows in range(most, most // 4, -1) if size % rows == 0), most)


def _dot(x: jax.Array, rows: jax.Array) -> jax.Array:
    """x [T, K] times rows [R, ...], of K elements each: [T, R]."""
    rows = rows.reshape(rows.shape[0], -1)
    if x.shape[0] in SWAPPED_TOKENS:
        return jax.lax.dot_general(rows, x, (((1,), (1,)), ((), ())), jax.lax.Precision.HIGHEST, jnp.float32).T
    return jax.lax.dot_general(x, rows, (((1,), (1,)), ((), ())), jax.lax.Precision.HIGHEST, jnp.float32)
