"""Residual addition and root mean square norm said plainly; XLA makes of them what it can."""

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels.float16 import narrowed
from jaxserve.pallas_kernels.parts import sum_parts


def rms_norm(x: jax.Array, weight: jax.Array, eps: float, dtype: jnp.dtype | None = None) -> jax.Array:
    """Normalise over the last axis in float32, then multiply in x's dtype, or in float32 for another one: [..., K] -> [..., K]."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    weight = weight.reshape((1,) * (x.ndim - 1) + weight.shape)
    return weighted(wide, weight, x.dtype, dtype or x.dtype)


def weighted(normed: jax.Array, weight: jax.Array, dtype: jnp.dtype, out_dtype: jnp.dtype) -> jax.Array:
    """Values normalised in float32 times the weight: in `dtype`, or in float32 where the result is to be of another; inside kernels too."""
    return normed.astype(dtype) * weight if dtype == out_dtype else narrowed(normed * weight.astype(jnp.float32), out_dtype)


def add_branch(x: jax.Array, residual: jax.Array) -> jax.Array:
    """x [T, K], or parts of it [P, T, K] that are added up in float32, plus the residual stream [T, K]; only the whole sum is rounded."""
    return added(sum_parts(x), residual)


def added(branch: jax.Array, residual: jax.Array) -> jax.Array:
    """Their sum in the residual's dtype, added in float32 where theirs differ; inside kernels too."""
    # Of equal dtypes nothing is widened: XLA sees what cuBLAS can add in the product before, which does not round that either.
    wide = residual.dtype if branch.dtype == residual.dtype else jnp.float32
    return (branch.astype(wide) + residual.astype(wide)).astype(residual.dtype)


def add_rms_norm_reference(
    x: jax.Array, residual: jax.Array, weight: jax.Array, eps: float, dtype: jnp.dtype | None = None
) -> tuple[jax.Array, jax.Array]:
    """As `add_rms_norm`."""
    residual = add_branch(x, residual)
    return rms_norm(residual, weight, eps, dtype), residual
