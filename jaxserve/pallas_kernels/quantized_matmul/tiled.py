"""A quantized weight as a CPU multiplies it: tiles of neighbouring rows, which lie side by side as the lanes of its vectors do."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.pallas_kernels.quantized_matmul.layout import Arrays, Layout

LANES = 64  # a line of the cache with codes of 8 bits
_BLOCK = 32  # columns that are summed up before their sum is scaled
_FEWEST_COLUMNS = 16  # of a block: with fewer, scaling costs as much as the products
# By benchmarks/gguf_decode.py and products in a chain, on 2 cores with 1 MB of second-level cache each.
FEW_TOKENS = 2
# Up to so many tokens, by the bits of a code, so little is widened at once that XLA leaves it to one thread. Two are faster while what one
# core has written comes quickly to the other, and up to three times slower while it does not: both were seen on one virtual machine, on one
# day. Codes of 8 bits are widened faster, and gain more by a second thread.
_ONE_THREAD_TOKENS = {4: 8, 8: 4}
# Of float32 that are widened at a time.
_ONE_THREAD_ELEMENTS, _ELEMENTS = 96 * 1024, 1024 * 1024


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TiledWeight:
    """A matrix [N, K] as `Layout` tells, of integers with 4 or 8 bits.

    Attributes:
        codes: int8 [N / L, K / B, B, L], or uint8 [N / L, K / B, B / 2, L]: L rows a tile, B columns a block. Of 4 bits the first half of
            a block's columns is in the low halves of its bytes, and int4 counts from -8.
        scales, zeros, minima: [N / L, G, L], as unpacked, but for the dtype of scales and minima.
        layout: static.
    """

    codes: jax.Array
    scales: jax.Array
    zeros: jax.Array | None
    minima: jax.Array | None
    layout: Layout = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:
        """N and K."""
        tiles, blocks, height, lanes = self.codes.shape
        return tiles * lanes, blocks * height * (8 // self.layout.bits)

    def rows(self, indices: jax.Array, dtype: Any) -> jax.Array:
        """Rows [T, K] of the matrix in dtype; indices int32 [T] within it."""
        tiles, lanes = indices // LANES, indices % LANES
        return jax.tree.map(lambda x: x.at[tiles, ..., lanes].get(mode="promise_in_bounds")[..., None], self).dequantize(dtype)

    def dequantize(self, dtype: Any) -> jax.Array:
        """The matrix [N, K] in dtype."""
        return self.transposed().T.astype(dtype)

    def transposed(self) -> jax.Array:
        """The transposed matrix, float32 [K, N]."""
        tiles, groups, lanes = self.scales.shape
        codes = jnp.concatenate(self.halves(), axis=2) if self.layout.bits == 4 else self.codes
        codes = jnp.moveaxis(codes, 0, 2).reshape(groups, -1, tiles, lanes)

        def by_group(values: jax.Array) -> jax.Array:
            return jnp.moveaxis(values.astype(jnp.float32), 0, 1)[:, None]

        # By way of int32: 10 to 20 % faster than from bytes at once.
        values = codes.astype(jnp.int32).astype(jnp.float32) - jnp.float32(self.offset)
        if self.zeros is not None:
            values = values - by_group(self.zeros)
        values = values * by_group(self.scales)
        if self.minima is not None:
            values = values + by_group(self.minima)
        # Without the barrier XLA's loop goes over tiles and lanes as one, and finds out for each element which tile it is of: no vectors.
        return jax.lax.optimization_barrier(values).reshape(-1, tiles * lanes)

    def halves(self) -> tuple[jax.Array, jax.Array]:
        """Codes of the first and of the second half of each block's columns, [N / L, K / B, B / 2, L]."""
        if self.layout.bits == 4:
            return self.codes & jnp.uint8(15), self.codes >> jnp.uint8(4)
        first, second = jnp.split(self.codes, 2, axis=2)
        return first, second

    @property
    def offset(self) -> int:
        """What a code counts from, with the sign turned."""
        return 8 if self.layout.code == "int4" else 0


def takes_tiles(layout: Layout, n: int, k: int) -> bool:
    """Whether a matrix [n, k] can be a TiledWeight."""
    return layout.code in ("int4", "uint4", "int8") and n % LANES == 0 and _block_of(layout, k) >= _FEWEST_COLUMNS


def pack_tiles(unpacked: Arrays, layout: Layout) -> Arrays:
    """The arrays of a TiledWeight of unpacked ones, whose scales and minimums have their dtype."""
    n, k = unpacked["codes"].shape
    packed = {name: jnp.swapaxes(x.reshape(n // LANES, LANES, -1), 1, 2) for name, x in unpacked.items() if name != "input_scale"}
    codes = packed["codes"].reshape(n // LANES, -1, _block_of(layout, k), LANES)
    if layout.bits == 4:
        first, second = jnp.split((codes + jnp.int8(8 if layout.code == "int4" else 0)).astype(jnp.uint8), 2, axis=2)
        codes = first | (second << jnp.uint8(4))
    return unpacked | packed | {"codes": codes}


def _block_of(layout: Layout, k: int) -> int:
    return int(np.gcd(layout.group_of(k), _BLOCK))


def tiled_matmul(x: jax.Array, weight: TiledWeight, out_dtype: jnp.dtype) -> jax.Array:
    """As `quantized_matmul`."""
    wide = x.astype(jnp.float32)
    return (_few_tokens(wide, weight) if x.shape[0] <= FEW_TOKENS else _many_tokens(wide, weight)).astype(out_dtype)


def _few_tokens(x: jax.Array, weight: TiledWeight) -> jax.Array:
    """Codes are widened in registers, once a token; a block's sum is scaled.

    XLA makes two loops of this: sums of blocks, with its inmost loop over lanes, since sums of few terms are unrolled; and sums of these.
    """
    tokens = x.shape[0]
    tiles, blocks, _, lanes = weight.codes.shape
    groups = weight.scales.shape[1]
    by_block = x.reshape(tokens, blocks, 2, -1)
    # Two sums, one for each half of a block, since an addition waits for the one before.
    first, second = (
        _sum(codes[:, None].astype(jnp.float32) * by_block[None, :, :, half, :, None], 3) for half, codes in enumerate(weight.halves())
    )

    def by_group(values: jax.Array) -> jax.Array:
        return values.astype(jnp.float32)[:, None, :, None]

    scales = by_group(weight.scales)
    sums = (first + second).reshape(tiles, tokens, groups, -1, lanes) * scales
    moved = None if weight.minima is None else by_group(weight.minima)
    if weight.zeros is not None or weight.offset:
        zeros = jnp.float32(weight.offset) if weight.zeros is None else by_group(weight.zeros) + jnp.float32(weight.offset)
        moved = -zeros * scales
    if moved is not None:
        sums = sums + x.reshape(tokens, groups, blocks // groups, -1).sum(axis=3)[None, ..., None] * moved
    # The barriers keep both loops apart, and from what follows: XLA would make the sums of blocks anew for each of their readers.
    y = _sum(jax.lax.optimization_barrier(sums.reshape(tiles, tokens, blocks, lanes)), 2)
    return jnp.swapaxes(jax.lax.optimization_barrier(y), 0, 1).reshape(tokens, -1)


def _sum(x: jax.Array, axis: int) -> jax.Array:
    """Sums along an axis, by XLA's own loops.

    With the barrier an addition is none of those that XLA hands over to YNNPACK, which first writes down all that is added up.
    """
    return jax.lax.reduce(x, np.float32(0), lambda a, b: jax.lax.optimization_barrier(a) + b, (axis,))


def _many_tokens(x: jax.Array, weight: TiledWeight) -> jax.Array:
    """Some tiles at a time are widened to float32, and multiplied while the cache has them."""
    tokens, depth = x.shape
    tiles, lanes = weight.codes.shape[0], weight.codes.shape[3]
    elements = _ONE_THREAD_ELEMENTS if tokens <= _ONE_THREAD_TOKENS[weight.layout.bits] else _ELEMENTS
    most = max(elements // (depth * lanes), 1)
    # What is widened waits for x: all matrices of a program at once, before any is multiplied, would each need memory of its own.
    x, weight = jax.lax.optimization_barrier((x, weight))

    def product(part: TiledWeight) -> jax.Array:
        return jax.lax.dot_general(x, part.transposed(), (((1,), (0,)), ((), ())), jax.lax.Precision.HIGHEST, jnp.float32)

    def some(begin: int, end: int) -> TiledWeight:
        return jax.tree.map(lambda a: a[begin:end], weight)

    if tiles <= most:
        return product(weight)
    if tiles <= 2 * most:
        # Of gate and up each is a half: their reader takes them as they are, and nothing is copied.
        first, second = jax.lax.optimization_barrier((product(some(0, tiles // 2)), some(tiles // 2, tiles)))
        return jnp.concatenate([first, product(second)], axis=1)
    together = next((count for count in range(most, most // 4, -1) if tiles % count == 0), most)
    count, rest = divmod(tiles, together)
    whole = jax.tree.map(lambda a: a.reshape(count, together, *a.shape[1:]), some(0, count * together))

    def write(place: jax.Array, y: jax.Array) -> jax.Array:
        part = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, place, keepdims=False), whole)
        return jax.lax.dynamic_update_slice_in_dim(y, product(part), place * (together * lanes), axis=1)

    # Begun with a value of x: of zeros XLA makes one array for all products of a program, and a copy for each, all of them at its start.
    y = jax.lax.fori_loop(0, count, write, jnp.broadcast_to(x[:1, :1], (tokens, tiles * lanes)))
    return jax.lax.dynamic_update_slice_in_dim(y, product(some(tiles - rest, tiles)), count * together * lanes, axis=1) if rest else y
