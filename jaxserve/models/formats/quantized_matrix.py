"""What a quantized matrix of the running model is made of, and its arrays as the parameters that are declared."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxserve.errors import StartupError, WeightsError
from jaxserve.models.formats.scheme import Scheme, Tensors, Unpacked
from jaxserve.models.formats.storages import CHECKS, STORAGES
from jaxserve.models.magnitude import largest_magnitude
from jaxserve.models.parameters import Axis, Parameter, Source, Stored
from jaxserve.pallas_kernels import Layout, packed_shapes

_PIECE_ELEMENTS = 1 << 21


@dataclass(frozen=True)
class QuantizedMatrix:
    """A matrix of modules whose rows are stacked within each shard.

    Its arrays lie on the mesh shard after shard along their first axis, whatever they hold: a kernel decides how those of a shard look.

    Attributes:
        sources: of its modules' dense weights [n, k], whose names end in ".weight"; they are cut along the same axis.
        scheme: how all of them are quantized.
    """

    sources: tuple[Source, ...]
    scheme: Scheme

    @property
    def columns(self) -> Axis:
        """The axis that all sources share."""
        return self.sources[0].axes[1]

    @property
    def sharded(self) -> bool:
        """Whether shards hold different parts."""
        return any(axis.units for axis in self.sources[0].axes)

    @property
    def is_permuted(self) -> bool:
        """Whether columns are in another order than the model's."""
        return not self.scheme.ordered

    @property
    def dense(self) -> Parameter:
        """The matrix before it was quantized."""
        return Parameter(self.sources)

    @property
    def tensors(self) -> tuple[Stored, ...]:
        """What the checkpoint must hold."""
        if self.scheme.stored == "dense":
            return self.dense.tensors
        storage = STORAGES[self.scheme.stored]
        return tuple(stored for source in self.sources for stored in storage.tensors(self.scheme, _module(source), *source.shape))

    def local_size(self, shards: int) -> tuple[int, int]:
        """Rows and columns of one shard."""
        return sum(source.axes[0].local_size(shards) for source in self.sources), self.columns.local_size(shards)

    def check_shards(self, shards: int) -> None:
        """Whether so many devices can hold it.

        Raises:
            StartupError: the codes of a row would end within a byte.
        """
        columns = self.local_size(shards)[1]
        if self.scheme.layout.bits == 4 and columns % 2:
            name, kind = _module(self.sources[0]), self.scheme.layout.code
            raise StartupError(f"{name}: {columns} columns for each device of {shards} are an odd number, which {kind} does not pack")

    def unpacked_shapes(self, shards: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The arrays of one shard, as `read` makes them."""
        n, k = self.local_size(shards)
        shapes = self.scheme.layout.unpacked_shapes(n, k)
        return shapes | ({"permutation": jax.ShapeDtypeStruct((k,), jnp.int32)} if self.is_permuted else {})

    def packed_shapes(self, shards: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The arrays of one shard, as they stay on the device that is traced for."""
        shapes = packed_shapes(self.scheme.layout, *self.local_size(shards))
        return shapes | {name: shape for name, shape in self.unpacked_shapes(shards).items() if name == "permutation"}

    def parts(self) -> "dict[str, QuantizedPart]":
        """Declarations of the arrays, by name."""
        names = {"codes", "scales"} | ({"permutation"} if self.is_permuted else set())
        names |= {"zero": {"zeros"}, "minimum": {"minimums"}}.get(self.scheme.layout.correction, set())
        names |= {"input_scale"} if self.scheme.layout.static else set()
        return {name: QuantizedPart(self, name) for name in sorted(names)}

    def read(self, tensors: Tensors, shard: int, shards: int) -> Unpacked:
        """Build one shard, reading little more than what it holds; in pieces of rows, on all cores.

        Raises:
            WeightsError: the tensors contradict each other or the configuration, or float32 does not hold what they stand for.
        """
        filled = {name: np.zeros(shape.shape, shape.dtype) for name, shape in self.unpacked_shapes(shards).items()}
        columns = self.columns.bounds(shard, shards)
        if check := CHECKS.get(self.scheme.stored):
            for source in self.sources:
                check(self.scheme, tensors, _module(source), *source.shape)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda piece: self._fill(filled, tensors, columns, *piece), self._pieces(shard, shards)))
        return filled

    def _pieces(self, shard: int, shards: int) -> Iterator[tuple[Source, slice, int]]:
        """(source, some of its rows, where in the shard they begin)."""
        first = 0
        for source in self.sources:
            axis = source.axes[0]
            bounds = axis.bounds(shard, shards)
            unit = axis.size // (axis.units or axis.size)
            step = max(_PIECE_ELEMENTS // self.columns.size // unit, 1) * unit
            for start in range(bounds.start, bounds.stop, step):
                yield source, slice(start, min(start + step, bounds.stop)), first + start - bounds.start
            first += axis.local_size(shards)

    def _fill(self, filled: Unpacked, tensors: Tensors, columns: slice, source: Source, rows: slice, first: int) -> None:
        read = slice(0, self.columns.size) if self.is_permuted else columns
        with np.errstate(invalid="ignore", over="ignore"):  # what comes of it is looked at below
            part = STORAGES[self.scheme.stored].read(self.scheme, tensors, _module(source), rows, read)
        if self.is_permuted:
            part = _of_columns(part, columns, self.scheme)
        kept: Unpacked = {}
        for name, values in part.items():
            if name == "permutation":
                filled[name][:] = values
            elif name == "input_scale":
                _check_positive(_module(source), name, values)
                # One scale serves all stacked modules: the largest, so that none of them overflows.
                filled[name][:] = np.maximum(filled[name], values)
            else:
                kept[name] = filled[name][first : first + len(values)]
                with np.errstate(over="ignore"):  # of a scale in float64
                    kept[name][:] = values
        _check_elements(_module(source), kept, self.scheme.layout)


@dataclass(frozen=True)
class QuantizedPart:
    """One array of a quantized matrix; declared like a `Parameter`."""

    matrix: QuantizedMatrix
    name: str

    @property
    def sources(self) -> tuple[Source, ...]:
        """Of the matrix."""
        return self.matrix.sources

    @property
    def tensors(self) -> tuple[Stored, ...]:
        """Of the matrix."""
        return self.matrix.tensors

    @property
    def spec(self) -> PartitionSpec:
        """How the array lies on the mesh."""
        return PartitionSpec("tensor") if self.matrix.sharded else PartitionSpec()

    def local_shape(self, shards: int) -> tuple[int, ...]:
        """Shape of one shard, on the device that is traced for."""
        return self.matrix.packed_shapes(shards)[self.name].shape

    def shape(self, shards: int) -> tuple[int, ...]:
        """Shape of the whole array."""
        first, *rest = self.local_shape(shards)
        return first * (shards if self.matrix.sharded else 1), *rest

    def dtype(self, activations: jnp.dtype, shards: int = 1) -> jnp.dtype:
        """Of the array, whatever the model computes in; a GPU's kernels may take a whole matrix and not a shard of it."""
        del activations
        return jnp.dtype(self.matrix.packed_shapes(shards)[self.name].dtype)

    def prefixed(self, prefix: str) -> "QuantizedPart":
        """The same with `prefix` before the names of its sources."""
        sources = tuple(Source(prefix + source.name, source.axes) for source in self.sources)
        return QuantizedPart(replace(self.matrix, sources=sources), self.name)


def _of_columns(part: Unpacked, columns: slice, scheme: Scheme) -> Unpacked:
    """Some of the sorted columns of whole rows."""
    starts = np.arange(columns.start, columns.stop, scheme.layout.group_of(columns.stop - columns.start))
    groups = starts // scheme.layout.group_of(part["codes"].shape[1])
    cut = {"codes": part["codes"][:, columns], "permutation": part["permutation"][columns]}
    return part | cut | {name: part[name][:, groups] for name in part.keys() & {"scales", "zeros", "minimums"}}


def _module(source: Source) -> str:
    return source.name.removesuffix(".weight")


def _check_elements(module: str, kept: Unpacked, layout: Layout) -> None:
    """Whether the arrays of some rows are numbers, and what they stand for too, whatever the codes are."""
    floats = [name for name in kept if name in ("scales", "minimums") or kept[name].dtype == jnp.float8_e4m3fn]
    largest = {name: largest_magnitude(kept[name]) for name in floats}
    for name in floats:
        if not np.isfinite(largest[name]):
            raise WeightsError(f"{module} has {name} that are infinite or not numbers")
    if largest["scales"] * layout.largest_code + largest.get("minimums", 0) > float(np.finfo(np.float32).max):
        raise WeightsError(f"{module} has scales up to {largest['scales']:.6g}, whose products with its codes are beyond float32")


def _check_positive(module: str, name: str, values: np.ndarray) -> None:
    if not (np.isfinite(values).all() and (values > 0).all()):
        raise WeightsError(f"{module}.{name} is not a number above zero")
