"""A quantized weight in the plainest form: rows of codes, and for each row the scales of its groups."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels.matmul import matmul
from jaxserve.pallas_kernels.quantized_matmul.layout import TABLES, Layout


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PlainWeight:
    """A matrix [N, K] as `Layout` tells, with groups of any size: on the CPU, and for what the kernels of GPUs do not take.

    Attributes:
        codes: 8 bits: as unpacked, [N, K]. 4 bits: uint8 [N, K / 2], whose byte j has columns 2j (the low half) and 2j + 1.
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

    def rows(self, indices: jax.Array, dtype: Any) -> jax.Array:
        """Rows [T, K] of the matrix in dtype; indices int32 [T] within it."""
        return jax.tree.map(lambda x: x.at[indices].get(mode="promise_in_bounds"), self).dequantize(dtype)

    def dequantize(self, dtype: Any) -> jax.Array:
        """The matrix [N, K] in dtype."""
        scales = self.scales.astype(jnp.float32)[:, :, None]
        values = self._values().reshape(*self.scales.shape, -1)
        if self.zeros is not None:
            values = values - self.zeros.astype(jnp.float32)[:, :, None]
        values = values * scales
        if self.minima is not None:
            values = values + self.minima.astype(jnp.float32)[:, :, None]
        return values.astype(dtype).reshape(self.shape)

    def _values(self) -> jax.Array:
        """What codes stand for, float32 [N, K]."""
        if self.layout.bits == 8:
            return self.codes.astype(jnp.float32)
        codes = jnp.stack([self.codes & jnp.uint8(15), self.codes >> jnp.uint8(4)], axis=2).reshape(self.shape)
        if self.layout.code in ("int4", "uint4"):
            return codes.astype(jnp.float32) - jnp.float32(8 if self.layout.code == "int4" else 0)
        return jnp.asarray(TABLES[self.layout.code]).at[codes].get(mode="promise_in_bounds")


def pack_plain(codes: jax.Array, layout: Layout) -> jax.Array:
    """The codes of a PlainWeight of unpacked ones, int8 [N, K]."""
    if layout.bits == 8:
        return codes
    halves = (codes + jnp.int8(8 if layout.code == "int4" else 0)).astype(jnp.uint8)
    return halves[:, 0::2] | (halves[:, 1::2] << jnp.uint8(4))


def plain_matmul(x: jax.Array, weight: PlainWeight, out_dtype: jnp.dtype) -> jax.Array:
    """As `quantized_matmul`."""
    return matmul(x, weight.dequantize(x.dtype), out_dtype)
