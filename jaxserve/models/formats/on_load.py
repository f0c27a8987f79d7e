"""Quantizing a dense matrix while it is loaded (`--quantize`), on the devices."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np

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
# Of a block's largest element, for its scale, where a code is an entry of a table and columns count differently.
_FACTORS = tuple(0.6 + 0.025 * step for step in range(21))
_LARGEST = {"int8": 127.0, "fp8": 448.0, "nf4": 1.0, "fp4": 1.0}


def quantize(weight: jax.Array, layout: Layout, cut_columns: bool, moments: jax.Array | None = None) -> dict[str, jax.Array]:
    """The unpacked arrays of a weight [n, k], a shard inside `jax.shard_map`: a scale makes its group's largest element the largest code.

    Args:
        cut_columns: the shards have columns each: a row's scale is that of the whole row.
        moments: float32 [k], mean squares of each column's inputs: of scales around the largest element's, those with the least error
            of the products are taken. Such layouts have groups (`by_moments`).
    """
    n, k = weight.shape
    groups = weight.astype(jnp.float32).reshape(n, -1, layout.group_of(k))
    largest = jnp.max(jnp.abs(groups), axis=2)
    if cut_columns and not layout.group:
        largest = jax.lax.pmax(largest, "tensor")
    scales = largest / jnp.float32(_LARGEST[layout.code])
    # Of smaller ones a GPU keeps some bits: what they divide would come out too large. A CPU takes them for zero.
    scales = jnp.where(scales < jnp.finfo(jnp.float32).tiny, jnp.float32(0), scales)
    if layout.code == "fp8":
        scales = _best_scales(groups, scales, layout, cut_columns)
    elif moments is not None:
        scales = _scales_by_moments(groups, scales, layout, moments.reshape(1, -1, groups.shape[2]))
    return {"codes": _codes(_relative(groups, scales), layout).reshape(n, k), "scales": scales}


def by_moments(layout: Layout) -> bool:
    """Whether `quantize` has a use for what goes into the matrix: 4 bits are so few that it matters."""
    return layout.code in TABLES


def _relative(groups: jax.Array, scales: jax.Array) -> jax.Array:
    """Elements [n, groups, columns] divided by their scale: the reciprocal of the smallest is beyond float32.

    Where the scale is zero they are zero, or too small to have one, and stay so: their codes are zero.
    """
    return groups / jnp.where(scales > 0, scales, jnp.float32(1))[:, :, None]


def _scales_by_moments(groups: jax.Array, scales: jax.Array, layout: Layout, moments: jax.Array) -> jax.Array:
    """Scales [n, groups], of factors times those of the largest elements, with the least squared error weighted by `moments`."""

    def step(best: tuple[jax.Array, jax.Array], factor: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        chosen, least = best
        tried = scales * factor
        missed = (_values(_relative(groups, tried), layout) * tried[:, :, None] - groups) ** 2
        error = (missed * moments).sum(axis=2)
        return (jnp.where(error < least, tried, chosen), jnp.minimum(error, least)), None

    start = scales, jnp.full(scales.shape, jnp.inf, jnp.float32)
    (best, _), _ = jax.lax.scan(step, start, jnp.asarray(_FACTORS, jnp.float32))
    return best


def _values(relative: jax.Array, layout: Layout) -> jax.Array:
    """The nearest entries of the layout's table."""
    table = np.sort(TABLES[layout.code])
    values = jnp.full(relative.shape, table[0])
    for low, high in pairwise(table):
        values = jnp.where(relative > (low + high) / 2, high, values)
    return values


def _best_scales(groups: jax.Array, scales: jax.Array, layout: Layout, cut_columns: bool) -> jax.Array:
    """Of the scales within an octave above the least ones, those with the least squared error.

    The steps of a float double at powers of two, so that it matters where in an octave the bulk of a row comes to lie.
    """
    candidates = [scales * jnp.float32(2 ** (step / 8)) for step in range(8)]

    def error(scales: jax.Array) -> jax.Array:
        missed = (_codes(_relative(groups, scales), layout).astype(jnp.float32) * scales[:, :, None] - groups) ** 2
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
