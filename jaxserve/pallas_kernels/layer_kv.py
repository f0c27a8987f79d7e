"""The KV cache of one layer: its layout, which only this package knows."""

import jax
import jax.numpy as jnp

LayerKV = tuple[jax.Array, jax.Array]
"""K pages and V pages of one layer, each of `layer_kv_shape` (inside shard_map: the local KV heads)."""

KV_HEADS_AXIS = 1
"""The axis of K and V pages that tensor shards split."""


def layer_kv_shape(num_pages: int, page_size: int, num_kv_heads: int, head_dim: int) -> tuple[int, int, int, int]:
    """Shape of a layer's K pages, and of its V pages.

    A page holds one contiguous [page_size, head_dim] tile a head, so that a block of pages is gathered straight into the
    head-major operand of a matrix product.
    """
    return num_pages, num_kv_heads, page_size, head_dim


def make_layer_kv(num_pages: int, page_size: int, num_kv_heads: int, head_dim: int, dtype: jnp.dtype) -> LayerKV:
    """Zeroed pages: attention multiplies what it masks by zero, so the pool must never hold NaN from uninitialised memory."""
    shape = layer_kv_shape(num_pages, page_size, num_kv_heads, head_dim)
    return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)
