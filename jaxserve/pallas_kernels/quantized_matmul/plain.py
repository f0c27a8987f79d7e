"""A quantized weight in the plainest form: rows of codes, and for each row the scales of its groups."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels.float8 import float8_values
from jaxserve.pallas_kernels.quantized_matmul.layout import TABLES, Layout


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PlainWeight:
    """A matrix [N, K] as `Layout` tells, with groups of any size: on the CPU, and for what the kernels of GPUs do not take.

    Attributes:
        codes: int8: as unpacked, [N, K]. fp8: its bits, uint8 [N, K]. 4 bits: uint8 [N, K / 2]; of a group's columns the first half is in
            the low halves of its bytes.
        scales, zeros, minima: [N, G], as unpacked, but for the dtype of scales and minima.
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
        rows, bytes_a_row = self.codes.shape
        return rows, bytes_a_row * (8 // self.layout.bits)

    @property
    def planes(self) -> int:
        """Arrays that codes come apart into: 2 with 4 bits, whose halves of bytes need not be brought side by side."""
        return 8 // self.layout.bits

    def rows(self, indices: jax.Array, dtype: Any) -> jax.Array:
        """Rows [T, K] of the matrix in dtype; indices int32 [T] within it."""
        return jax.tree.map(lambda x: x.at[indices].get(mode="promise_in_bounds"), self).dequantize(dtype)

    def dequantize(self, dtype: Any) -> jax.Array:
        """The matrix [N, K] in dtype."""
        values = jnp.concatenate([self.scaled(plane) for plane in range(self.planes)], axis=2)
        if self.minima is not None:
            values = values + self.minima.astype(jnp.float32)[:, :, None]
        return values.astype(dtype).reshape(self.shape)

    def scaled(self, plane: int) -> jax.Array:
        """What the codes of a plane stand for, without minima: float32 [N, G, K / G / planes]."""
        values = self._values(plane).reshape(*self.scales.shape, -1)
        if self.zeros is not None:
            values = values - self.zeros.astype(jnp.float32)[:, :, None]
        return values * self.scales.astype(jnp.float32)[:, :, None]

    def _values(self, plane: int) -> jax.Array:
        if self.layout.code == "fp8":
            return float8_values(self.codes, jnp.dtype(jnp.float8_e4m3fn))
        if self.layout.bits == 8:
            return self.codes.astype(jnp.float32)
        codes = self.codes >> jnp.uint8(4) if plane else self.codes & jnp.uint8(15)
        if self.layout.code in ("int4", "uint4"):
            return codes.astype(jnp.float32) - jnp.float32(8 if self.layout.code == "int4" else 0)
        return _look_up(codes, TABLES[self.layout.code].tolist())


def _look_up(codes: jax.Array, table: list[float]) -> jax.Array:
    """Entries of a table by choices between halves of it, which compilers turn into vectors as they do not with gathers."""
    choices = [jnp.full(codes.shape, value, jnp.float32) for value in table]
    bit = 1
    while len(choices) > 1:
        odd = (codes & jnp.uint8(bit)) != jnp.uint8(0)
        choices = [jnp.where(odd, right, left) for left, right in zip(choices[0::2], choices[1::2], strict=True)]
        bit *= 2
    return choices[0]


def pack_plain(codes: jax.Array, layout: Layout) -> jax.Array:
    """The codes of a PlainWeight of unpacked ones, int8 [N, K]."""
    if layout.code == "fp8":
        return jax.lax.bitcast_convert_type(codes, jnp.uint8)
    if layout.bits == 8:
        return codes
    n, k = codes.shape
    halves = (codes + jnp.int8(8 if layout.code == "int4" else 0)).astype(jnp.uint8).reshape(n, k // layout.group_of(k), 2, -1)
    return (halves[:, :, 0] | (halves[:, :, 1] << jnp.uint8(4))).reshape(n, -1)
