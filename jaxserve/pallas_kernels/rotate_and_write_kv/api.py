"""What stands between the projection of queries, keys and values and attention, whatever the device."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels.gpu import local_gpu
from jaxserve.pallas_kernels.layer_kv import KVScales, LayerKV
from jaxserve.pallas_kernels.metadata import AttentionMetadata
from jaxserve.pallas_kernels.projected import Projected
from jaxserve.pallas_kernels.rotate_and_write_kv.reference import rotate_and_write_kv_reference


def rotate_and_write_kv(
    qkv: jax.Array,
    rotation: tuple[jax.Array, jax.Array],
    kv: LayerKV,
    metadata: AttentionMetadata,
    *,
    bias: jax.Array | None,
    norms: tuple[jax.Array, jax.Array] | None,
    eps: float,
    dtype: jnp.dtype | None = None,
    scales: KVScales | None = None,
) -> tuple[jax.Array, LayerKV]:
    """Cut a merged projection into heads, rotate queries and keys, and store keys and values in their pages.

    Rotary embeddings (Su et al. 2021, arXiv 2104.09864) turn element i of a head with element i + D/2, in float32.

    Args:
        qkv: [T, (H + 2 KH) D] of a step's tokens: query heads, key heads, value heads; or parts of it [P, T, (H + 2 KH) D] as
            `matmul_parts` gives them.
        rotation: cosine and sine, float32 [T, 1, D/2] each.
        kv: the layer's pages; written in place where the arrays are donated.
        metadata: of the layer's KV group; padding tokens are dropped.
        bias: [(H + 2 KH) D], added first; None: none.
        norms: weights [D] of the root mean square norms of query and key heads, before they are rotated; None: none.
        eps: of the norms.
        dtype: of queries, to which the sum of parts is rounded, and keys and values before they are stored; None: qkv's.
        scales: keys and values are stored divided by them; None: as they are.

    Returns:
        Queries [T, H, D] in `dtype`, and the pages. Queries are multiplied by the scale of their keys, so that their
        products with stored keys are those with the keys.

    Raises:
        ValueError: shapes that do not fit together.
    """
    options: dict[str, Any] = dict(bias=bias, norms=norms, eps=eps, dtype=jnp.dtype(dtype or qkv.dtype), scales=scales)
    Projected.of(qkv, rotation, kv, metadata, **options)
    if local_gpu() is None:
        return rotate_and_write_kv_reference(qkv, rotation, kv, metadata, **options)
    # Pallas takes over a second to import: not where there is no GPU.
    from jaxserve.pallas_kernels.rotate_and_write_kv.triton import RotateConfig, rotate_and_write_kv_triton

    config = RotateConfig.suited(qkv, kv, metadata.deterministic)
    return rotate_and_write_kv_triton(qkv, rotation, kv, metadata, config=config, **options)
