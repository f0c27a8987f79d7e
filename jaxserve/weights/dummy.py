"""Random weights of a model's shape (`--load-format dummy`): for benchmarks, and made on the devices; the same on every mesh."""

import functools
import itertools
import zlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.models.parameters import Axis, Parameter, Source

DUMMY_BOUND = 1e-3
"""Of random weights, as vLLM 0.24.0 draws them, so that speeds compare: at its power limit a GPU is faster on small weights."""

type Axes = tuple[tuple[Axis, ...], ...]
"""Of the tensors that are stacked along their first axis."""


def random_array(parameter: Parameter, mesh: Mesh, dtype: jnp.dtype, bound: float, kept: jnp.dtype | None = None) -> jax.Array:
    """Weights uniform in -bound..bound, norms of one; the same in every run.

    Args:
        dtype: that they are rounded to.
        kept: what they are kept in; None: that, too.
    """
    kept = kept or dtype
    if parameter.initializer == "ones":
        return jnp.ones(parameter.shape(mesh.shape["tensor"]), kept, device=NamedSharding(mesh, parameter.spec))
    return _maker(mesh, parameter.spec, axes_of(parameter.sources), dtype, kept, bound)(seed_of(parameter.sources))


def axes_of(sources: Sequence[Source]) -> Axes:
    """What random_bits() takes: without names, so that layers share a compiled program."""
    return tuple(source.axes for source in sources)


def seed_of(sources: Sequence[Source]) -> np.uint32:
    """Of an array made of these tensors."""
    return np.uint32(zlib.crc32(sources[0].name.encode()))


@functools.cache
def _maker(
    mesh: Mesh, spec: PartitionSpec, axes: Axes, dtype: jnp.dtype, kept: jnp.dtype, bound: float
) -> Callable[[np.uint32], jax.Array]:
    rounding = jnp.finfo(dtype)

    def make(seed: jax.Array) -> jax.Array:
        unit = random_bits(seed, axes).astype(jnp.float32) * jnp.float32(2**-32) - jnp.float32(0.5)
        weights = unit * jnp.float32(2 * bound)
        if dtype == kept:
            return weights.astype(dtype)
        # XLA would leave out a conversion between two others.
        return lax.reduce_precision(weights, rounding.nexp, rounding.nmant).astype(kept)

    return jax.jit(jax.shard_map(make, mesh=mesh, in_specs=PartitionSpec(), out_specs=spec, check_vma=False))


def random_bits(seed: jax.Array, axes: Axes) -> jax.Array:
    """The local shard of an array of random uint32; to be traced inside `jax.shard_map`.

    An element hashes its place in the array that one device would hold, by MurmurHash3's finalizer (Appleby 2011): compiles and runs 5
    times as fast as jax.random.
    """
    sizes = [sum(stacked[0].size for stacked in axes), *(axis.size for axis in axes[0][1:])]
    firsts = itertools.accumulate((stacked[0].size for stacked in axes[:-1]), initial=0)
    rows = [jnp.uint32(first) + places(stacked[0]) for stacked, first in zip(axes, firsts, strict=True)]
    found = [jnp.concatenate(rows) if len(rows) > 1 else rows[0], *map(places, axes[0][1:])]
    shape = tuple(place.size for place in found)
    bits = jnp.broadcast_to(seed, shape)
    for axis, (size, place) in enumerate(zip(sizes, found, strict=True)):
        bits = bits * jnp.uint32(size) + lax.broadcast_in_dim(place, shape, (axis,))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        bits = (bits ^ (bits >> jnp.uint32(shift))) * jnp.uint32(factor)
    return bits


def places(axis: Axis) -> jax.Array:
    """uint32: which elements of a tensor's axis a shard holds, as `Axis.bounds` says; inside `jax.shard_map`, too."""
    shards, shard = lax.axis_size("tensor"), lax.axis_index("tensor").astype(jnp.uint32)
    local = axis.local_size(shards)
    held = lax.iota(jnp.uint32, local)
    if not axis.units:
        return held
    part = shard if axis.pad else shard * jnp.uint32(min(shards, axis.units)) // jnp.uint32(shards)
    return part * jnp.uint32(local) + held
