"""Writing a step's keys and values to their pages."""

import jax

from jaxserve.pallas_kernels.layer_kv import LayerKV
from jaxserve.pallas_kernels.metadata import AttentionMetadata


def write_kv(kv: LayerKV, k: jax.Array, v: jax.Array, metadata: AttentionMetadata) -> LayerKV:
    """Store K and V [T, KH, D] of a step's tokens; in place where the arrays are donated. Padding tokens are dropped."""

    def write(pages: jax.Array, new: jax.Array) -> jax.Array:
        place = pages.at[metadata.write_pages, :, metadata.write_offsets]
        return place.set(new.astype(pages.dtype), mode="drop", unique_indices=True)

    return write(kv[0], k), write(kv[1], v)
