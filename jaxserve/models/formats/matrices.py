"""The modules that own the arrays of a matrix and compute the product with it."""

from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.models.formats.quantization import Quantization
from jaxserve.models.formats.quantized_matrix import QuantizedMatrix
from jaxserve.models.parameters import Parameter, Source
from jaxserve.pallas_kernels import (
    add_matmul,
    gated_matmul,
    matmul,
    matmul_parts,
    multiply_gated,
    quantized_add_matmul,
    quantized_gated_matmul,
    quantized_matmul,
    quantized_matmul_parts,
    weight_of,
)


class Format(Protocol):
    """A matrix [N, K], a local shard of it, however it is kept."""

    def matmul(self, x: jax.Array, out_dtype: jnp.dtype | None = None, fixed_order: bool = False) -> jax.Array:
        """x [T, K] times the transposed matrix: [T, N], in x's dtype if not in another one.

        Args:
            fixed_order: here and below, as in `pallas_kernels.matmul`; what is quantized does not know it.
        """
        ...

    def matmul_parts(self, x: jax.Array, dtype: jnp.dtype | None = None, fixed_order: bool = False) -> jax.Array:
        """The same, or parts of it [P, T, N] that are still to be added up (`add_parts`); in x's dtype, or float32 if `dtype` says so."""
        ...

    def added(self, x: jax.Array, residual: jax.Array, fixed_order: bool = False) -> jax.Array | None:
        """The residual stream [T, N] with the product in it; None where who reads the stream is to add what `matmul_parts` gives."""
        ...

    def gated(self, x: jax.Array, dtype: jnp.dtype, fixed_order: bool = False) -> jax.Array:
        """silu(gate) * up, [T, N / 2] in a dtype, where the upper half of the matrix is a gate's."""
        ...

    def rows(self, indices: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Rows of the matrix, [T, K], of indices int32 [T] within it."""
        ...

    def input_dtype(self, activations: jnp.dtype) -> jnp.dtype:
        """What x is to be where all else is of the dtype `activations`."""
        ...


def make_format(quantization: Quantization, sources: tuple[Source, ...], prefix: str = "", after_norm: bool = False) -> Format:
    """Declare a matrix made of the stacked rows of `sources`.

    Args:
        prefix: what the checkpoint has before the names of the sources.
        after_norm: as in Parameter, where nothing is quantized.
    """
    schemes = [quantization.scheme((prefix + source.name).removesuffix(".weight")) for source in sources]
    if not any(schemes):
        return DenseFormat(sources, after_norm)
    if len(set(schemes)) > 1 or (len(sources) > 1 and schemes[0] and not schemes[0].ordered):
        return StackedFormat([make_format(quantization, (source,), prefix) for source in sources])
    assert schemes[0] is not None
    return QuantizedFormat(QuantizedMatrix(sources, schemes[0]))


class DenseFormat(nnx.Module):
    """A matrix kept as [N, K] in the dtype of the activations, or in attention's."""

    def __init__(self, sources: tuple[Source, ...], after_norm: bool = False):
        self.weight = nnx.Param(Parameter(sources, after_norm=after_norm))

    def matmul(self, x: jax.Array, out_dtype: jnp.dtype | None = None, fixed_order: bool = False) -> jax.Array:
        """As in `Format`."""
        return matmul(x, self.weight[...], out_dtype or x.dtype, fixed_order)

    def matmul_parts(self, x: jax.Array, dtype: jnp.dtype | None = None, fixed_order: bool = False) -> jax.Array:
        """As in `Format`."""
        return matmul_parts(x, self.weight[...], dtype, fixed_order)

    def added(self, x: jax.Array, residual: jax.Array, fixed_order: bool = False) -> jax.Array | None:
        """As in `Format`."""
        return add_matmul(x, self.weight[...], residual, fixed_order)

    def gated(self, x: jax.Array, dtype: jnp.dtype, fixed_order: bool = False) -> jax.Array:
        """As in `Format`."""
        return gated_matmul(x, self.weight[...], dtype, fixed_order)

    def rows(self, indices: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """As in `Format`."""
        return self.weight[...].at[indices].get(mode="promise_in_bounds").astype(dtype)

    def input_dtype(self, activations: jnp.dtype) -> jnp.dtype:
        """As in `Format`."""
        del activations
        return self.weight[...].dtype


class QuantizedFormat(nnx.Module):
    """A matrix kept as codes and scales."""

    def __init__(self, matrix: QuantizedMatrix):
        self.layout = matrix.scheme.layout
        self.columns = matrix.columns
        self.is_permuted = matrix.is_permuted
        self.arrays = nnx.Dict({name: nnx.Param(part) for name, part in matrix.parts().items()})

    def matmul(self, x: jax.Array, out_dtype: jnp.dtype | None = None, fixed_order: bool = False) -> jax.Array:
        """As in `Format`."""
        del fixed_order
        x, arrays = self._operands(x)
        return quantized_matmul(x, weight_of(arrays, self.layout, x.shape[1]), out_dtype or x.dtype)

    def matmul_parts(self, x: jax.Array, dtype: jnp.dtype | None = None, fixed_order: bool = False) -> jax.Array:
        """As in `Format`."""
        del dtype, fixed_order
        x, arrays = self._operands(x)
        return quantized_matmul_parts(x, weight_of(arrays, self.layout, x.shape[1]))

    def added(self, x: jax.Array, residual: jax.Array, fixed_order: bool = False) -> jax.Array | None:
        """As in `Format`."""
        del fixed_order
        if self.is_permuted:
            return None
        return quantized_add_matmul(x, weight_of(self._arrays(), self.layout, x.shape[1]), residual)

    def _operands(self, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """x as the arrays take its columns, and those of the weight."""
        arrays = self._arrays()
        if self.is_permuted:
            # Columns are sorted by their group, over all shards: each needs some of everybody's x.
            everything = jax.lax.all_gather(x, "tensor", axis=1, tiled=True) if self.columns.units else x
            x = everything.at[:, arrays.pop("permutation")].get(mode="promise_in_bounds")
        return x, arrays

    def gated(self, x: jax.Array, dtype: jnp.dtype, fixed_order: bool = False) -> jax.Array:
        """As in `Format`."""
        del fixed_order
        x, arrays = self._operands(x)
        return quantized_gated_matmul(x, weight_of(arrays, self.layout, x.shape[1])).astype(dtype)

    def rows(self, indices: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """As in `Format`."""
        k = self.columns.size  # nobody looks up parts of rows
        return weight_of(self._arrays(), self.layout, k).rows(indices, dtype)[:, :k]

    def input_dtype(self, activations: jnp.dtype) -> jnp.dtype:
        """As in `Format`."""
        return activations

    def _arrays(self) -> dict[str, jax.Array]:
        return {name: array[...] for name, array in self.arrays.items()}


class StackedFormat(nnx.Module):
    """Matrices that are kept in different ways, one above the other."""

    def __init__(self, formats: list[Format]):
        self.formats = nnx.List(formats)

    def matmul(self, x: jax.Array, out_dtype: jnp.dtype | None = None, fixed_order: bool = False) -> jax.Array:
        """As in `Format`."""
        return jnp.concatenate([part.matmul(x, out_dtype, fixed_order) for part in self.formats], axis=1)

    def matmul_parts(self, x: jax.Array, dtype: jnp.dtype | None = None, fixed_order: bool = False) -> jax.Array:
        """As in `Format`."""
        return self.matmul(x, dtype, fixed_order)

    def added(self, x: jax.Array, residual: jax.Array, fixed_order: bool = False) -> jax.Array | None:
        """Each matrix has some columns of the stream."""
        del x, residual, fixed_order

    def gated(self, x: jax.Array, dtype: jnp.dtype, fixed_order: bool = False) -> jax.Array:
        """As in `Format`."""
        return multiply_gated(self.matmul(x, fixed_order=fixed_order), dtype)

    def rows(self, indices: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Nobody looks up rows of stacked matrices."""
        raise NotImplementedError

    def input_dtype(self, activations: jnp.dtype) -> jnp.dtype:
        """As in `Format`."""
        return activations
