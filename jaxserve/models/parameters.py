"""What a model declares of each parameter, once.

A module holds a `Parameter` where its array will be: where it comes from in the checkpoint and how tensor parallelism
cuts it. Shapes, shardings, random weights and loading all follow from the declaration; running, the array takes its place.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxserve.pallas_kernels import attention_dtype

Read = Callable[[str, tuple[slice, ...]], np.ndarray]
"""(checkpoint name, a slice an axis) -> that part of the tensor."""


_PIECE_ELEMENTS = 1 << 22
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Axis:
    """A dimension of a checkpoint's tensor, and how tensor parallelism cuts it.

    Attributes:
        name: what it counts, for people.
        size: elements in the checkpoint.
        units: pieces that must stay whole, such as heads; 0 where every shard holds all of the axis.
        repeat: where there are fewer units than shards, neighbouring shards hold the same unit (KV heads).
        pad: the last shard is filled up with zeros (vocabulary); otherwise the shards must divide the units.
    """

    name: str
    size: int
    units: int = 0
    repeat: bool = False
    pad: bool = False

    def local_size(self, shards: int) -> int:
        """Elements that one of `shards` shards holds."""
        if not self.units:
            return self.size
        if self.pad:
            return -(-self.size // shards)
        return self.size // min(shards, self.units)

    def bounds(self, shard: int, shards: int) -> slice:
        """The elements of the checkpoint that a shard holds; fewer than `local_size` where the rest is padding."""
        if not self.units:
            return slice(0, self.size)
        local = self.local_size(shards)
        if self.pad:
            return slice(min(shard * local, self.size), min((shard + 1) * local, self.size))
        start = shard * min(shards, self.units) // shards * local
        return slice(start, start + local)

    def divides(self, shards: int) -> bool:
        """Whether this many shards can share the axis."""
        return not self.units or self.pad or self.units % shards == 0 or (self.repeat and shards % self.units == 0)


@dataclass(frozen=True)
class Stored:
    """A tensor that a checkpoint must hold.

    Attributes:
        name: in the checkpoint.
        shape: there; (): a single number, of any shape; None: any.
        dtypes: that are read, as safetensors calls them.
        optional: it may be absent.
    """

    name: str
    shape: tuple[int, ...] | None
    dtypes: tuple[str, ...] = FLOATS
    optional: bool = False


@dataclass(frozen=True)
class Source:
    """One tensor of the checkpoint; its name is relative to the decoder layer that holds it, if any."""

    name: str
    axes: tuple[Axis, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape in the checkpoint."""
        return tuple(axis.size for axis in self.axes)


@dataclass(frozen=True)
class Parameter:
    """One array of the running model: checkpoint tensors, stacked along the first axis within each tensor shard.

    Attributes:
        sources: what it is made of, in order; they are cut along the same axis.
        initializer: of random weights.
        after_norm: a matrix that takes what a norm in a layer gives, in `attention_dtype`.
    """

    sources: tuple[Source, ...]
    initializer: Literal["normal", "ones"] = "normal"
    after_norm: bool = False

    @property
    def sharded_axis(self) -> int | None:
        """The axis spread over the tensor shards."""
        return next((i for i, axis in enumerate(self.sources[0].axes) if axis.units), None)

    @property
    def spec(self) -> PartitionSpec:
        """How the array lies on the mesh."""
        return PartitionSpec(*("tensor" if i == self.sharded_axis else None for i in range(len(self.sources[0].axes))))

    @property
    def tensors(self) -> tuple[Stored, ...]:
        """What the checkpoint must hold."""
        return tuple(Stored(source.name, source.shape) for source in self.sources)

    def dtype(self, activations: jnp.dtype, shards: int = 1) -> jnp.dtype:
        """Of the array, where the model computes in `activations`, on however many shards."""
        del shards
        return attention_dtype(activations) if self.after_norm else activations

    def prefixed(self, prefix: str) -> "Parameter":
        """The same with `prefix` before the names of its sources."""
        return replace(self, sources=tuple(Source(prefix + source.name, source.axes) for source in self.sources))

    def local_shape(self, shards: int) -> tuple[int, ...]:
        """Shape of one shard."""
        rows = sum(source.axes[0].local_size(shards) for source in self.sources)
        return rows, *(axis.local_size(shards) for axis in self.sources[0].axes[1:])

    def shape(self, shards: int) -> tuple[int, ...]:
        """Shape of the whole array; its rows are ordered by shard, and repeated heads count as often as they are held."""
        return tuple(n * shards if i == self.sharded_axis else n for i, n in enumerate(self.local_shape(shards)))

    def read(self, read: Read, shard: int, shards: int, dtype: np.dtype) -> np.ndarray:
        """Build one shard, reading nothing but what it holds, in pieces of whole heads that are converted one by one."""
        array = _aligned_zeros(self.local_shape(shards), dtype)
        row_size = array[:1].size
        first = 0
        for source in self.sources:
            rows, *columns = (axis.bounds(shard, shards) for axis in source.axes)
            unit = source.axes[0].size // (source.axes[0].units or source.axes[0].size)
            step = max(_PIECE_ELEMENTS // row_size // unit, 1) * unit
            for start in range(rows.start, rows.stop, step):
                piece = slice(start, min(start + step, rows.stop))
                array[first + piece.start - rows.start : first + piece.stop - rows.start] = read(source.name, (piece, *columns))
            first += source.axes[0].local_size(shards)
        return array


def _aligned_zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Zeros at an address that is a multiple of 64, which JAX takes over on the CPU without a copy."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.zeros(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)
