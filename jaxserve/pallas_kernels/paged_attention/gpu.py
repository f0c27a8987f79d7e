"""Paged attention on NVIDIA GPUs: which kernel takes which tokens of a step."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels.gpu import Gpu
from jaxserve.pallas_kernels.layer_kv import LayerKV
from jaxserve.pallas_kernels.metadata import AttentionMetadata
from jaxserve.pallas_kernels.paged_attention.mosaic_decode import MosaicDecodeConfig, decode_attention_mosaic
from jaxserve.pallas_kernels.paged_attention.mosaic_prefill import MosaicPrefillConfig, prefill_attention_mosaic
from jaxserve.pallas_kernels.paged_attention.triton_decode import TritonDecodeConfig, decode_attention_triton
from jaxserve.pallas_kernels.paged_attention.triton_deterministic import DeterministicConfig, deterministic_attention_triton
from jaxserve.pallas_kernels.paged_attention.triton_prefill import TritonPrefillConfig, prefill_attention_triton


def paged_attention_gpu(
    q: jax.Array,
    kv: LayerKV,
    metadata: AttentionMetadata,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    gpu: Gpu,
    out_dtype: jnp.dtype | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`paged_attention` by kernels: rows of one token by a decode kernel, longer chunks by a prefill kernel; a deterministic step by one.

    Shapes and `out_dtype` as in `paged_attention`; q is bfloat16 or float16, K and V of q's type or float8.
    """
    options: dict[str, Any] = dict(scale=scale, window=window, soft_cap=soft_cap, out_dtype=out_dtype, interpret=interpret)
    if metadata.deterministic:
        longest = metadata.page_table.shape[1] * kv[0].shape[2]
        config = DeterministicConfig.suited(q, kv, longest, gpu.num_multiprocessors)
        return deterministic_attention_triton(q, kv, metadata, config=config, **options)
    if metadata.decode_only:
        return _decode(q, kv, metadata, metadata.kv_lens, gpu, options)
    starts = metadata.query_starts[:-1]
    single = metadata.query_starts[1:] - starts == 1
    num_tokens = q.shape[0]
    rows = q[jnp.minimum(starts, num_tokens - 1)]
    decoded = _decode(rows, kv, metadata, jnp.where(single, metadata.kv_lens, 0), gpu, options)
    prefilled = _prefill(q, kv, metadata, gpu, options)
    return prefilled.at[jnp.where(single, starts, num_tokens)].set(decoded, mode="drop")


def _decode(q: jax.Array, kv: LayerKV, metadata: AttentionMetadata, kv_lens: jax.Array, gpu: Gpu, options: dict) -> jax.Array:
    config = MosaicDecodeConfig.suited(q, kv, gpu.num_multiprocessors) if gpu.is_hopper else None
    if gpu.only_mosaic:
        config = MosaicDecodeConfig.cut(q.shape[2], gpu.num_multiprocessors)
    if config is not None:
        return decode_attention_mosaic(q, kv, metadata.page_table, kv_lens, config=config, **options)
    config = TritonDecodeConfig.suited(q, kv, gpu.num_multiprocessors)
    return decode_attention_triton(q, kv, metadata.page_table, kv_lens, arrivals=metadata.plan, config=config, **options)


def _prefill(q: jax.Array, kv: LayerKV, metadata: AttentionMetadata, gpu: Gpu, options: dict) -> jax.Array:
    config = MosaicPrefillConfig.suited(q, kv) if gpu.is_hopper else None
    if config is not None:
        return prefill_attention_mosaic(q, kv, metadata, config=config, **options)
    return prefill_attention_triton(q, kv, metadata, config=TritonPrefillConfig.suited(q), **options)
