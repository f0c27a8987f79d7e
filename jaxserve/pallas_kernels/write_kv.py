"""Writing a step's keys and values to their pages."""

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels.layer_kv import KVScales, LayerKV, to_pages
from jaxserve.pallas_kernels.metadata import AttentionMetadata


def write_kv(kv: LayerKV, k: jax.Array, v: jax.Array, metadata: AttentionMetadata, scales: KVScales | None = None) -> LayerKV:
    """Store K and V [T, KH, D] of a step's tokens; in place where the arrays are donated. Padding tokens are dropped.

    Args:
        scales: what they are divided by first; None: they are stored as they are.
    """

    def write(pages: jax.Array, new: jax.Array, scale: jax.Array | None) -> jax.Array:
        if scale is not None:
            new = new.astype(jnp.float32) / scale[None, :, None]
        place = pages.at[metadata.write_pages, :, metadata.write_offsets]
        return place.set(to_pages(new, pages.dtype), mode="drop", unique_indices=True)

    key_scale, value_scale = scales or (None, None)
    return write(kv[0], k, key_scale), write(kv[1], v, value_scale)
