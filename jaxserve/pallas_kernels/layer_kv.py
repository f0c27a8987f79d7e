"""The KV cache of one layer: its layout, which only this package knows."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.pallas_kernels.float8 import float8_values

LayerKV = tuple[jax.Array, jax.Array]
"""K pages and V pages of one layer, each of `layer_kv_shape` (inside shard_map: the local KV heads)."""

KVScales = tuple[jax.Array, jax.Array]
"""float32 [KH] each: what keys and values of a head are divided by before they are stored in pages of 8 bits."""

FLOAT8 = (jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.float8_e5m2))

# Pages that are arrays of the bytes of a float8; their dtype tells which.
_FLOAT8_OF_BYTES = dict(zip((jnp.dtype(jnp.uint8), jnp.dtype(jnp.int8)), FLOAT8, strict=True))

KV_HEADS_AXIS = 1
"""The axis of K and V pages that tensor shards split."""


def page_dtype(dtype: jnp.dtype, platform: str) -> jnp.dtype:
    """Of the arrays that hold keys and values of a dtype on a platform, "cpu" or "gpu".

    XLA's CPU compiler scatters no float8: it would widen the whole cache to write a token. There, pages are arrays of bytes.
    """
    bytes_of = {float8: stored for stored, float8 in _FLOAT8_OF_BYTES.items()}
    return bytes_of.get(dtype, dtype) if platform == "cpu" else dtype


def to_pages(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Keys or values as pages of a dtype hold them; what a float8 cannot hold becomes its largest value."""
    float8 = _FLOAT8_OF_BYTES.get(dtype, dtype)
    if float8 not in FLOAT8:
        return x.astype(dtype)
    most = float(jnp.finfo(float8).max)
    codes = jnp.clip(x, -most, most).astype(float8)
    return codes if float8 == dtype else lax.bitcast_convert_type(codes, dtype)


def from_pages(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """A part of pages as keys or values: of 8 bits in `dtype`, others as they are."""
    if x.dtype in _FLOAT8_OF_BYTES:
        return float8_values(x, _FLOAT8_OF_BYTES[x.dtype]).astype(dtype)
    return x.astype(dtype) if x.dtype in FLOAT8 else x


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
