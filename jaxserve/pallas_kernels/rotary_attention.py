"""From a layer's projection to its attention, whatever the device."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels.layer_kv import KVScales, LayerKV
from jaxserve.pallas_kernels.metadata import AttentionMetadata
from jaxserve.pallas_kernels.paged_attention.api import chosen_gpu, paged_attention, scaled_values
from jaxserve.pallas_kernels.projected import Projected
from jaxserve.pallas_kernels.rotate_and_write_kv import rotate_and_write_kv


def rotary_attention(
    qkv: jax.Array,
    rotation: tuple[jax.Array, jax.Array],
    kv: LayerKV,
    metadata: AttentionMetadata,
    *,
    bias: jax.Array | None,
    norms: tuple[jax.Array, jax.Array] | None,
    eps: float,
    dtype: jnp.dtype,
    scales: KVScales | None,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    implementation: str = "auto",
    out_dtype: jnp.dtype | None = None,
) -> tuple[jax.Array, LayerKV]:
    """`rotate_and_write_kv`, then `paged_attention` of all tokens: one kernel where the step is of decodes and the kernel does both.

    Args: theirs; `scales` are those of keys and values.

    Returns:
        [T, H, D] in `out_dtype`, and the pages.

    Raises:
        ValueError: as they do.
    """
    options: dict[str, Any] = dict(bias=bias, norms=norms, eps=eps, dtype=dtype, scales=scales)
    attention: dict[str, Any] = dict(scale=scale, window=window, soft_cap=soft_cap, out_dtype=out_dtype)
    value_scales = None if scales is None else scales[1]
    gpu = chosen_gpu(implementation)
    if gpu is not None and metadata.decode_only and dtype != jnp.float32:
        # Pallas takes over a second to import: not where there is no GPU.
        from jaxserve.pallas_kernels.paged_attention.gpu import decode_projected, rotates

        if rotates(metadata.plan):
            out, kv = decode_projected(Projected.of(qkv, rotation, kv, metadata, **options), kv, metadata, gpu=gpu, **attention)
            return scaled_values(out, value_scales), kv
    q, kv = rotate_and_write_kv(qkv, rotation, kv, metadata, **options)
    return paged_attention(q, kv, metadata, implementation=implementation, value_scales=value_scales, **attention), kv
