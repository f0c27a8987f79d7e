"""Putting a quantized matrix on a mesh: read as it is and packed there, quantized there, or made up there."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxserve.models.formats import QuantizedMatrix, quantize
from jaxserve.pallas_kernels import TABLES, Layout, pack
from jaxserve.weights.checkpoint import Checkpoint
from jaxserve.weights.dummy import Axes, axes_of, places, random_bits, seed_of


def load_stored(matrix: QuantizedMatrix, checkpoint: Checkpoint, mesh: Mesh) -> dict[str, jax.Array]:
    """The arrays of a matrix that the checkpoint has quantized.

    Raises:
        WeightsError: a file cannot be read, or its tensors contradict each other; one line.
    """
    shards, spec = mesh.shape["tensor"], _spec(matrix)
    shapes, sharding = matrix.unpacked_shapes(shards), NamedSharding(mesh, spec)
    read = functools.cache(lambda shard: matrix.read(checkpoint, shard, shards))

    def load(name: str) -> jax.Array:
        first, *rest = shapes[name].shape
        count = shards if matrix.sharded else 1

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            start = index[0].start or 0 if index else 0
            return read(start // first)[name]

        return jax.make_array_from_callback((first * count, *rest), sharding, part)

    unpacked = {name: load(name) for name in shapes}
    return _packer(matrix.scheme.layout, mesh, spec)(unpacked)


def load_and_quantize(matrix: QuantizedMatrix, weight: jax.Array, moments: jax.Array | None, mesh: Mesh) -> dict[str, jax.Array]:
    """The arrays of a dense matrix that lies on the mesh, as `matrix.dense` declares it.

    Args:
        moments: as in `quantize`; they lie on the mesh as the matrix's columns do.
    """
    return _quantizer(matrix.scheme.layout, mesh, matrix.dense.spec, bool(matrix.columns.units), _spec(matrix))(weight, moments)


def random_matrix(matrix: QuantizedMatrix, mesh: Mesh, bound: float) -> dict[str, jax.Array]:
    """Arrays with random codes, whose elements deviate as much as uniform ones in -bound..bound; the same in every run."""
    shapes = tuple((name, shape.shape, shape.dtype) for name, shape in matrix.unpacked_shapes(mesh.shape["tensor"]).items())
    return _maker(matrix.scheme.layout, mesh, _spec(matrix), shapes, axes_of(matrix.sources), bound / 3**0.5)(seed_of(matrix.sources))


def _spec(matrix: QuantizedMatrix) -> P:
    return P("tensor") if matrix.sharded else P()


def _pack(unpacked: dict[str, jax.Array], layout: Layout) -> dict[str, jax.Array]:
    beside = {name: unpacked.pop(name) for name in unpacked.keys() & {"permutation"}}
    return pack(unpacked, layout) | beside


@functools.cache
def _packer(layout: Layout, mesh: Mesh, spec: P) -> Callable[[dict[str, jax.Array]], dict[str, jax.Array]]:
    return jax.jit(jax.shard_map(lambda unpacked: _pack(dict(unpacked), layout), mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))


@functools.cache
def _quantizer(
    layout: Layout, mesh: Mesh, dense: P, cut_columns: bool, spec: P
) -> Callable[[jax.Array, jax.Array | None], dict[str, jax.Array]]:
    def quantize_shard(weight: jax.Array, moments: jax.Array | None) -> dict[str, jax.Array]:
        return pack(quantize(weight, layout, cut_columns, moments), layout)

    in_specs = dense, P("tensor") if cut_columns else P()
    return jax.jit(jax.shard_map(quantize_shard, mesh=mesh, in_specs=in_specs, out_specs=spec, check_vma=False))


@functools.cache
def _maker(
    layout: Layout, mesh: Mesh, spec: P, shapes: tuple[tuple[str, tuple[int, ...], jnp.dtype], ...], axes: Axes, deviation: float
) -> Callable[[np.uint32], dict[str, jax.Array]]:
    def make(seed: jax.Array) -> dict[str, jax.Array]:
        made: dict[str, jax.Array] = {}
        for name, shape, dtype in shapes:
            if name == "codes":
                made[name] = _random_codes(random_bits(seed, axes), layout)
            elif name == "permutation":
                made[name] = places(axes[0][1]).astype(dtype)
            elif name == "input_scale":
                made[name] = jnp.full(shape, 0.05, dtype)
            elif name in ("scales", "minimums"):
                factor = 1.0 if name == "scales" else -_MEANS.get(layout.code, 0.0)
                made[name] = jnp.full(shape, deviation / _DEVIATIONS[layout.code] * factor, dtype)
            else:
                made[name] = jnp.zeros(shape, dtype)
        return _pack(made, layout)

    return jax.jit(jax.shard_map(make, mesh=mesh, in_specs=P(), out_specs=spec, check_vma=False))


# Of what random codes stand for, see _random_codes.
_MEANS = {"uint4": 7.5}
_DEVIATIONS = {"int4": 4.32, "uint4": 4.61, "int8": 73.6, "fp8": 0.577 * 240, "nf4": 0.582, "fp4": 0.585, "e2m1": 3.51}


def _random_codes(bits: jax.Array, layout: Layout) -> jax.Array:
    if layout.code == "fp8":
        unit = bits.astype(jnp.float32) * jnp.float32(2**-31) - jnp.float32(1)
        return (unit * jnp.float32(240)).astype(jnp.float8_e4m3fn)
    if layout.bits == 8:
        return jnp.clip((bits >> jnp.uint32(24)).astype(jnp.int32) - jnp.int32(128), -127, 127).astype(jnp.int8)
    if layout.code == "int4":  # -7 to 7: with -8 their mean would not be 0, and every layer would add to one direction
        return ((bits >> jnp.uint32(16)) * jnp.uint32(15) >> jnp.uint32(16)).astype(jnp.int8) - jnp.int8(7)
    if layout.code == "uint4":
        return (bits >> jnp.uint32(28)).astype(jnp.int8)
    # The values nearest to uniform numbers: of random codes nf4's would not have a mean of 0 either.
    table = TABLES[layout.code].astype(np.float64)
    order = np.argsort(table)
    middles = (table[order][1:] + table[order][:-1]) / 2
    codes = jnp.full(bits.shape, order[0], jnp.int8)
    for middle, code in zip(middles / np.abs(table).max(), order[1:], strict=True):
        codes = jnp.where(bits > np.uint32((middle + 1) * 2**31), jnp.int8(code), codes)
    return codes
