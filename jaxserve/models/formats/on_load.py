"""Quantizing a dense matrix while it is loaded (`--quantize`), on the devices."""

import jax
import jax.numpy as jnp

from jaxserve.models.formats.scheme import Scheme
from jaxserve.pallas_kernels import TABLES, Layout

# The names are TGI's.
SCHEMES = {
    "fp8": Scheme("dense", Layout("fp8", activations="fp8")),
    "eetq": Scheme("dense", Layout("int8")),
    "bitsandbytes": Scheme("dense", Layout("int8")),
    "bitsandbytes-nf4": Scheme("dense", Layout("nf4", 64)),
    "bitsandbytes-fp4": Scheme("dense", Layout("fp4", 64)),
}
_LARGEST = {"int8": 127.0, "fp8": 448.0, "nf4": 1.0, "fp4": 1.0}


def quantize(weight: jax.Array, layout: Layout, cut_columns: bool) -> dict[str, jax.Array]:
    """The unpacked arrays of a weight [n, k], a shard inside `jax.shard_map`: a scale makes its group's largest element the largest code.

    Args:
        cut_columns: the shards have columns each: a row's scale is that of the whole row.
    """
    n, k = weight.shape
    groups = weight.astype(jnp.float32).reshape(n, -1, layout.group_of(k))
    largest = jnp.max(jnp.abs(groups), axis=2)
    if cut_columns and not layout.group:
        largest = jax.lax.pmax(largest, "tensor")
    scales = largest / jnp.float32(_LARGEST[layout.code])
    if layout.code == "fp8":
        scales = _best_scales(groups, scales, layout, cut_columns)
    # A group of zeros keeps a scale of zero, and codes of zero.
    relative = groups * jnp.where(scales > 0, jnp.float32(1) / scales, jnp.float32(0))[:, :, None]
    return {"codes": _codes(relative, layout).reshape(n, k), "scales": scales}


def _best_scales(groups: jax.Array, scales: jax.Array, layout: Layout, cut_columns: bool) -> jax.Array:
    """Of the scales within an octave above the least ones, those with the least squared error.

    The steps of a float double at powers of two, so that it matters where in an octave the bulk of a row comes to lie.
    """
    candidates = [scales * jnp.float32(2 ** (step / 8)) for step in range(8)]

    def error(scales: jax.Array) -> jax.Array:
        steps = jnp.where(scales > 0, scales, jnp.float32(1))[:, :, None]
        missed = (_codes(groups / steps, layout).astype(jnp.float32) * steps - groups) ** 2
        total = missed.sum(axis=2)
        return jax.lax.psum(total, "tensor") if cut_columns and not layout.group else total

    best, least = candidates[0], error(candidates[0])
    for candidate in candidates[1:]:
        found = error(candidate)
        best, least = jnp.where(found < least, candidate, best), jnp.minimum(found, least)
    return best


def _codes(relative: jax.Array, layout: Layout) -> jax.Array:
    """Nearest codes of elements that were divided by their scale."""
    if layout.code == "fp8":
        return relative.astype(jnp.float8_e4m3fn)
    if layout.code == "int8":
        return jnp.round(relative).astype(jnp.int8)
    table = TABLES[layout.code]
    ranks = table.argsort(kind="stable")
    borders = (table[ranks][1:] + table[ranks][:-1]) / 2
    above = jnp.zeros(relative.shape, jnp.int8)
    for border in borders:
        above = above + (relative > jnp.float32(border)).astype(jnp.int8)
    return jnp.asarray(ranks, jnp.int8).at[above].get(mode="promise_in_bounds")
