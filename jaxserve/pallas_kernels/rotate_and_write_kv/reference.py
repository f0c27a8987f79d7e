"""Rotation and KV write said plainly; XLA makes of them what it can."""

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels.add_rms_norm.reference import rms_norm
from jaxserve.pallas_kernels.float16 import narrowed
from jaxserve.pallas_kernels.layer_kv import KVScales, LayerKV
from jaxserve.pallas_kernels.metadata import AttentionMetadata
from jaxserve.pallas_kernels.write_kv import write_kv


def rotate_and_write_kv_reference(
    qkv: jax.Array,
    rotation: tuple[jax.Array, jax.Array],
    kv: LayerKV,
    metadata: AttentionMetadata,
    *,
    bias: jax.Array | None,
    norms: tuple[jax.Array, jax.Array] | None,
    eps: float,
    dtype: jnp.dtype,
    scales: KVScales | None = None,
) -> tuple[jax.Array, LayerKV]:
    """As `rotate_and_write_kv`."""
    _, num_kv_heads, _, head_dim = kv[0].shape
    if qkv.ndim == 3:
        qkv = qkv.astype(jnp.float32).sum(axis=0)
    qkv = narrowed(qkv, dtype)
    if bias is not None:
        qkv = narrowed(qkv.astype(jnp.float32) + bias[None, :].astype(jnp.float32), dtype)
    heads = qkv.reshape(qkv.shape[0], -1, head_dim)
    num_heads = heads.shape[1] - 2 * num_kv_heads
    q, k, v = jnp.split(heads, (num_heads, num_heads + num_kv_heads), axis=1)
    if norms is not None:
        q, k = (rms_norm(x, weight.astype(dtype), eps) for x, weight in zip((q, k), norms, strict=True))
    factors = None if scales is None else jnp.repeat(scales[0], num_heads // num_kv_heads)
    return rotate(q, rotation, factors), write_kv(kv, rotate(k, rotation), v, metadata, scales)


def rotate(x: jax.Array, rotation: tuple[jax.Array, jax.Array], factors: jax.Array | None = None) -> jax.Array:
    """Turn heads [T, H, D] by angles whose cosine and sine are float32 [T, 1, D/2]; computed in float32, returned in x's dtype.

    Args:
        factors: float32 [H], by which the heads are multiplied; None: one.
    """
    cos, sin = rotation
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return narrowed(turned if factors is None else turned * factors[None, :, None], x.dtype)
