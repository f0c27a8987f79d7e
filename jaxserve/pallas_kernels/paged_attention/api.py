"""Attention over a paged KV cache, whatever the device."""

from dataclasses import replace

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels.gpu import Gpu, local_gpu
from jaxserve.pallas_kernels.layer_kv import LayerKV
from jaxserve.pallas_kernels.metadata import AttentionMetadata, Queries
from jaxserve.pallas_kernels.paged_attention.xla import paged_attention_xla
from jaxserve.pallas_kernels.paged_attention.xla_plan import XlaPlan, plan_xla

IMPLEMENTATIONS = ("auto", "mosaic", "triton", "xla")


def check_implementation(
    implementation: str,
    dtype: jnp.dtype,
    kv_dtype: jnp.dtype | None = None,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
) -> None:
    """Whether `paged_attention` with this implementation can serve a model on this process's device.

    Args:
        implementation: of IMPLEMENTATIONS.
        dtype: of queries.
        kv_dtype: of keys and values; None: `dtype`.
        num_heads, num_kv_heads: on one device.

    Raises:
        ValueError: it cannot; one line.
    """
    if implementation in ("auto", "xla"):
        return
    gpu = local_gpu()
    if gpu is None:
        raise ValueError(f"{implementation} needs an NVIDIA GPU; this process computes on: {jax.default_backend()}")
    if dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(f"{implementation} computes bfloat16 and float16, not {dtype}")
    if implementation == "mosaic":
        # Pallas takes over a second to import: not where there is no GPU.
        from jaxserve.pallas_kernels.paged_attention.mosaic_decode import MosaicDecodeConfig

        if not gpu.is_hopper:
            raise ValueError("mosaic needs a Hopper GPU (compute capability 9.0); triton serves others")
        if kv_dtype not in (None, dtype):
            raise ValueError(f"mosaic reads keys and values of {dtype}, not {kv_dtype}; auto and triton do")
        if not MosaicDecodeConfig.goes(num_heads, num_kv_heads, head_dim, page_size):
            raise ValueError(
                f"mosaic does not go with {num_heads} heads, {num_kv_heads} KV heads of {head_dim}, pages of {page_size} tokens"
            )


def chosen_gpu(implementation: str) -> Gpu | None:
    """The GPU that kernels are chosen for, as `implementation` wants them; None: XLA computes."""
    gpu = local_gpu()
    if gpu is None or implementation == "xla":
        return None
    return replace(gpu, is_hopper=gpu.is_hopper and implementation != "triton", only_mosaic=implementation == "mosaic")


def plan_attention(
    metadata: AttentionMetadata,
    q: Queries,
    kv: LayerKV,
    *,
    window: int | None,
    implementation: str = "auto",
) -> AttentionMetadata:
    """Lay out a step's attention once for all layers of a KV group.

    Args:
        metadata: of the group.
        q: of a layer, or its shape and dtype.
        kv: of a layer; only shapes and dtypes matter.
        window, implementation: the layers'.
    """
    gpu = chosen_gpu(implementation)
    if gpu is None or q.dtype == jnp.float32:
        return replace(metadata, plan=plan_xla(metadata, page_size=kv[0].shape[2], window=window))
    # Pallas takes over a second to import: not where there is no GPU.
    from jaxserve.pallas_kernels.paged_attention.gpu import plan_attention_gpu

    return replace(metadata, plan=plan_attention_gpu(metadata, q, kv, window=window, gpu=gpu))


def paged_attention(
    q: jax.Array,
    kv: LayerKV,
    metadata: AttentionMetadata,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    implementation: str = "auto",
    value_scales: jax.Array | None = None,
    out_dtype: jnp.dtype | None = None,
) -> jax.Array:
    """Causal attention of a step's tokens over their rows' pages, this step's own K and V (already written) included.

    Args:
        q: [T, H, D]; query head h reads KV head h // (H // KH).
        kv: the layer's pages.
        metadata: of the layer's KV group.
        scale: scores are multiplied by it (before the soft cap).
        window: a token sees only the `window` latest positions, its own included; None: all.
        soft_cap: scores become soft_cap * tanh(scores / soft_cap); None: as they are.
        implementation: of IMPLEMENTATIONS; one that `check_implementation` lets pass.
        value_scales: float32 [KH], what values were divided by before they were stored; None: nothing. Those of keys are in the queries
            already (`rotate_and_write_kv`).
        out_dtype: of the result; None: q's.

    Returns:
        [T, H, D] in `out_dtype`; finite but meaningless for padding tokens.

    Raises:
        ValueError: shapes that do not fit together.
    """
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = kv[0].shape[1]
    if kv[0].shape[3] != head_dim or num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads of {head_dim} do not go with {num_kv_heads} KV heads of {kv[0].shape[3]}")
    num_rows = metadata.page_table.shape[0]
    if metadata.kv_lens.shape != (num_rows,) or metadata.query_starts.shape != (num_rows + 1,):
        raise ValueError(f"{num_rows} page tables, kv_lens {metadata.kv_lens.shape}, query_starts {metadata.query_starts.shape}")
    if metadata.decode_only and num_tokens != num_rows:
        raise ValueError(f"decode_only, but {num_tokens} tokens of {num_rows} rows")
    if value_scales is not None and value_scales.shape != (num_kv_heads,):
        raise ValueError(f"scales {value_scales.shape} of values do not go with {num_kv_heads} KV heads")
    out_dtype = jnp.dtype(out_dtype or q.dtype)
    gpu = chosen_gpu(implementation)
    if gpu is not None and q.dtype != jnp.float32:
        # Pallas takes over a second to import: not where there is no GPU.
        from jaxserve.pallas_kernels.paged_attention.gpu import paged_attention_gpu

        out = paged_attention_gpu(q, kv, metadata, scale=scale, window=window, soft_cap=soft_cap, out_dtype=out_dtype, gpu=gpu)
    else:
        plan = metadata.plan
        if not isinstance(plan, XlaPlan):
            plan = plan_xla(metadata, page_size=kv[0].shape[2], window=window)
        out = paged_attention_xla(q, kv, plan, scale=scale, window=window, soft_cap=soft_cap, out_dtype=out_dtype)
    return scaled_values(out, value_scales)


def scaled_values(out: jax.Array, scales: jax.Array | None) -> jax.Array:
    """What attention gives [T, H, D] over values that were divided by scales, float32 [KH], before they were stored; None: by nothing."""
    if scales is None:
        return out
    factors = jnp.repeat(scales, out.shape[1] // scales.size)[None, :, None]
    return (out.astype(jnp.float32) * factors).astype(out.dtype)
