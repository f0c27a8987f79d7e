"""The KV cache of one layer: its layout, which only this package knows, and writing to it."""

import jax
import jax.numpy as jnp

LayerKV = tuple[jax.Array, jax.Array]
"""K pages and V pages of one layer (the local KV heads of a tensor shard)."""


def layer_kv_shape(num_pages: int, page_size: int, num_kv_heads: int, head_dim: int) -> tuple[int, ...]:
    """Shape of a layer's K pages, and of its V pages; the axis that tensor shards split is `KV_HEADS_AXIS`."""
    return num_pages, page_size, num_kv_heads, head_dim


KV_HEADS_AXIS = 2


def make_layer_kv(num_pages: int, page_size: int, num_kv_heads: int, head_dim: int, dtype: jnp.dtype) -> LayerKV:
    """Zeroed pages: attention multiplies what it masks by zero, so the pool must never hold NaN from uninitialised memory."""
    shape = layer_kv_shape(num_pages, page_size, num_kv_heads, head_dim)
    return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)
