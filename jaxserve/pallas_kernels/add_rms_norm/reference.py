"""Residual addition and root mean square norm said plainly; XLA makes of them what it can."""

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Normalise over the last axis in float32, then multiply in x's dtype: [..., K] -> [..., K]."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return wide.astype(x.dtype) * weight.reshape((1,) * (x.ndim - 1) + weight.shape)


def add_rms_norm_reference(x: jax.Array, residual: jax.Array, weight: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """As `add_rms_norm`."""
    branch = x if x.ndim == 2 else x.astype(jnp.float32).sum(axis=0).astype(residual.dtype)
    residual = branch + residual
    return rms_norm(residual, weight, eps), residual
