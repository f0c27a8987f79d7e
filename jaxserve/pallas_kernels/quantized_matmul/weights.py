"""Weights of 4 and 8 bits as they lie in the device's memory."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

BLOCK = 128  # columns of a block of 4-bit codes
_PLANES = 4  # codes in a word
_WORDS = BLOCK // _PLANES


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FourBitWeight:
    """A matrix [N, K] of 4 bits an entry: scale * (code - zero) + minimum, in float32. B blocks of 128 columns, P groups in a block.

    A block's rows lie one after the other, so that a tile of rows is one run of bytes; a word holds one code of each quarter of the
    block, so that four tensor core operands come out of a tile of words without a value moving between threads.

    Attributes:
        codes: uint16 [B, N, 32]; four bits j (of 0 to 3, the lowest first) of word c of block b are column 128 b + 32 j + c.
        scales: float16, bfloat16 or float32 [B * P, N]; P is 1, 2 or 4: groups of 128, 64 or 32 columns.
        zeros: uint8 [B * P, N]; None: 8 throughout.
        minima: float [B * P, N]; None: 0.
        values: static; what the 16 codes stand for, in place of code - zero (zeros is None); exact in bfloat16 or rounded to it.
    """

    codes: jax.Array
    scales: jax.Array
    zeros: jax.Array | None = None
    minima: jax.Array | None = None
    values: tuple[float, ...] | None = field(default=None, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:
        """N, and K as padded to whole blocks."""
        return self.codes.shape[1], self.codes.shape[0] * BLOCK

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.shape[1] // self.scales.shape[0]

    def rows(self, indices: jax.Array, dtype: Any) -> jax.Array:
        """Rows [T, K] of the matrix in dtype; indices int32 [T] within it."""
        return jax.tree.map(lambda x: x.at[:, indices].get(mode="promise_in_bounds"), self).dequantize(dtype)

    def dequantize(self, dtype: Any) -> jax.Array:
        """The matrix [N, K] in dtype."""
        blocks, size, _ = self.codes.shape
        parts = self.scales.shape[0] // blocks
        shifts = jnp.arange(0, 16, 4, dtype=jnp.uint16).reshape(1, 1, _PLANES, 1)
        codes = (self.codes[:, :, None, :] >> shifts) & jnp.uint16(15)
        codes = codes.reshape(blocks, size, parts, BLOCK // parts)
        if self.values is None:
            numbers = codes.astype(jnp.float32) - (8.0 if self.zeros is None else _columns(self.zeros, blocks))
        else:
            numbers = jnp.asarray(self.values, jnp.float32).at[codes].get(mode="promise_in_bounds")
        numbers = numbers * _columns(self.scales, blocks)
        if self.minima is not None:
            numbers = numbers + _columns(self.minima, blocks)
        return numbers.astype(dtype).transpose(1, 0, 2, 3).reshape(self.shape)


def _columns(x: jax.Array, blocks: int) -> jax.Array:
    """What each group has, [B * P, N], as float32 [B, N, P, 1]."""
    return x.reshape(blocks, -1, x.shape[1]).swapaxes(1, 2)[..., None].astype(jnp.float32)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EightBitWeight:
    """A matrix [N, K] of 8 bits an entry: scale * (code - zero), in float32. G groups of columns.

    Attributes:
        codes: float8_e4m3fn or int8 [N, K].
        scales: float16, bfloat16 or float32 [G, N]; G is 1 (a scale a row), or K / G is 32, 64 or a multiple of 128.
        zeros: int16 [G, N]; None: 0.
        x_scale: float32 []; what activations are divided by before they are rounded, by the checkpoint; None: each token has its own.
        quantized_activations: static; activations may be rounded to the codes' dtype where products are then faster.
    """

    codes: jax.Array
    scales: jax.Array
    zeros: jax.Array | None = None
    x_scale: jax.Array | None = None
    quantized_activations: bool = field(default=False, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:
        """N and K."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.shape[1] // self.scales.shape[0]

    def rows(self, indices: jax.Array, dtype: Any) -> jax.Array:
        """Rows [T, K] of the matrix in dtype; indices int32 [T] within it."""
        scales, zeros = jax.tree.map(lambda x: x.at[:, indices].get(mode="promise_in_bounds"), (self.scales, self.zeros))
        return EightBitWeight(self.codes.at[indices].get(mode="promise_in_bounds"), scales, zeros).dequantize(dtype)

    def dequantize(self, dtype: Any) -> jax.Array:
        """The matrix [N, K] in dtype."""
        numbers = self.codes.astype(jnp.float32).reshape(self.shape[0], -1, self.group)
        if self.zeros is not None:
            numbers = numbers - self.zeros.T[:, :, None].astype(jnp.float32)
        return (numbers * self.scales.T[:, :, None].astype(jnp.float32)).astype(dtype).reshape(self.shape)


def pack_four_bit(
    codes: Any, scales: Any, zeros: Any = None, minima: Any = None, *, values: tuple[float, ...] | None = None, column_shards: int = 1
) -> FourBitWeight:
    """A FourBitWeight of plain arrays: codes [N, K] of any integer dtype, 0 to 15; scales, zeros and minima [N, K / group].

    Numpy arrays stay on the host, JAX's on the device. Each of `column_shards` equal shares of the columns is padded to whole blocks, with
    scales of zero: axis 0 of the results can then be cut into as many shards. Axis 1 is the rows.

    Raises:
        ValueError: the shares are not whole groups, or the group is neither 32, 64 nor a multiple of 128.
    """
    xp = codes.__array_namespace__()
    size, depth = codes.shape
    group = depth // scales.shape[1]
    if scales.shape[1] * group != depth or depth % (column_shards * min(group, BLOCK)) or not (group in (32, 64) or group % BLOCK == 0):
        raise ValueError(
            f"{depth} columns on {column_shards} devices, groups of {group}: a group is 32, 64 or a multiple of 128, never cut"
        )
    part = min(group, BLOCK)
    share = depth // column_shards
    padding = -share % BLOCK

    def groups(x: Any, fill: float) -> Any:
        if x is None:
            return None
        x = xp.repeat(x, group // part, axis=1) if group > part else x
        x = x.reshape(size, column_shards, share // part)
        x = xp.pad(x, ((0, 0), (0, 0), (0, padding // part)), constant_values=fill)
        return x.reshape(size, -1).T.copy()

    codes = xp.pad(codes.astype(xp.uint16).reshape(size, column_shards, share), ((0, 0), (0, 0), (0, padding)))
    codes = codes.reshape(size, -1, _PLANES, _WORDS)
    words = codes[:, :, 0] | (codes[:, :, 1] << 4) | (codes[:, :, 2] << 8) | (codes[:, :, 3] << 12)
    words = words.swapaxes(0, 1).copy()
    return FourBitWeight(words, groups(scales, 0), groups(zeros if zeros is None else zeros.astype(xp.uint8), 0), groups(minima, 0), values)
