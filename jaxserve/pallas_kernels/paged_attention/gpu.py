"""Paged attention on NVIDIA GPUs: which kernel takes which tokens of a step."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels.gpu import Gpu
from jaxserve.pallas_kernels.layer_kv import LayerKV
from jaxserve.pallas_kernels.metadata import AttentionMetadata, Queries
from jaxserve.pallas_kernels.paged_attention.decode_items import make_arrivals
from jaxserve.pallas_kernels.paged_attention.decode_plan import DecodePlan
from jaxserve.pallas_kernels.paged_attention.mosaic_decode import MosaicDecodeConfig, decode_attention_mosaic
from jaxserve.pallas_kernels.paged_attention.mosaic_prefill import BLOCK_Q, MosaicPrefillConfig, prefill_attention_mosaic
from jaxserve.pallas_kernels.paged_attention.prefill_plan import PrefillPlan, plan_prefill
from jaxserve.pallas_kernels.paged_attention.split_plan import SplitPlan
from jaxserve.pallas_kernels.paged_attention.triton_decode import TritonDecodeConfig, decode_attention_triton
from jaxserve.pallas_kernels.paged_attention.triton_deterministic import DeterministicConfig, deterministic_attention_triton
from jaxserve.pallas_kernels.paged_attention.triton_prefill import TritonPrefillConfig, prefill_attention_triton
from jaxserve.pallas_kernels.projected import Projected


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GpuPlan:
    """What the layers of a KV group have in common. Made anew in each, XLA would have to find out that it is the same.

    Attributes:
        decoded_lens: int32 [R], `kv_lens` of the rows that the decode kernel takes, 0 of the others.
        decode: that kernel's work: Mosaic's shares, or Triton's items.
        arrivals: Triton's counters; None for Mosaic's.
        prefill: the prefill kernel's tiles; None for a step of decodes, as all that follows.
        row_tokens: int32 [R] a token of each row, its only one where the decode kernel takes it.
        decoded_tokens: int32 [R] where the decode kernel's result goes; nowhere (T) for rows that it does not take.
    """

    decoded_lens: jax.Array
    decode: DecodePlan | jax.Array
    arrivals: jax.Ref | None
    prefill: PrefillPlan | None
    row_tokens: jax.Array | None
    decoded_tokens: jax.Array | None


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
    plan = metadata.plan if isinstance(metadata.plan, GpuPlan | SplitPlan) else plan_attention_gpu(metadata, q, kv, window=window, gpu=gpu)
    if isinstance(plan, SplitPlan):
        config = DeterministicConfig.suited(q, kv, gpu.num_multiprocessors)
        return deterministic_attention_triton(q, kv, metadata, plan=plan, config=config, **options)
    if metadata.decode_only:
        return _decode(q, kv, metadata, plan, gpu, options)[0]
    decoded, _ = _decode(q[plan.row_tokens], kv, metadata, plan, gpu, options)
    config = _prefill_config(q, kv, gpu)
    if isinstance(config, MosaicPrefillConfig):
        prefilled = prefill_attention_mosaic(q, kv, metadata, plan=plan.prefill, config=config, **options)
    else:
        prefilled = prefill_attention_triton(q, kv, metadata, plan=plan.prefill, config=config, **options)
    return prefilled.at[plan.decoded_tokens].set(decoded, mode="drop")


def rotates(plan: Any) -> bool:
    """Whether `decode_projected` takes a step of this plan."""
    return isinstance(plan, GpuPlan) and plan.prefill is None and plan.arrivals is not None


def decode_projected(
    projected: Projected,
    kv: LayerKV,
    metadata: AttentionMetadata,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    gpu: Gpu,
    out_dtype: jnp.dtype | None = None,
) -> tuple[jax.Array, LayerKV]:
    """Attention of a step of decodes [R, H, D], and the pages with its keys and values; its plan is one that `rotates`."""
    return _decode(projected, kv, metadata, metadata.plan, gpu, dict(scale=scale, window=window, soft_cap=soft_cap, out_dtype=out_dtype))


def plan_attention_gpu(metadata: AttentionMetadata, q: Queries, kv: LayerKV, *, window: int | None, gpu: Gpu) -> GpuPlan | SplitPlan:
    """Lay out what the layers of a KV group have in common; a SplitPlan for a deterministic step.

    Args:
        q: of a layer, or its shape and dtype.
        kv: of a layer; only shapes and dtypes matter.
    """
    if metadata.deterministic:
        return DeterministicConfig.suited(q, kv, gpu.num_multiprocessors).plan(metadata, q, kv, window)
    num_tokens, num_kv_heads = q.shape[0], kv[0].shape[1]
    if metadata.decode_only:
        lens, prefill, row_tokens, decoded_tokens = metadata.kv_lens, None, None, None
        rows = q
    else:
        starts = metadata.query_starts[:-1]
        single = metadata.query_starts[1:] - starts == 1
        lens, row_tokens = jnp.where(single, metadata.kv_lens, 0), jnp.minimum(starts, num_tokens - 1)
        decoded_tokens = jnp.where(single, starts, num_tokens)
        config = _prefill_config(q, kv, gpu)
        block_q = BLOCK_Q if isinstance(config, MosaicPrefillConfig) else config.block_q
        prefill = plan_prefill(metadata, num_tokens=num_tokens, block_q=block_q)
        rows = jax.ShapeDtypeStruct((starts.shape[0], *q.shape[1:]), q.dtype)
    config = _decode_config(rows, kv, gpu)
    arrivals = make_arrivals(rows.shape[0], num_kv_heads) if isinstance(config, TritonDecodeConfig) else None
    return GpuPlan(lens, config.plan(lens, num_kv_heads, window), arrivals, prefill, row_tokens, decoded_tokens)


def _decode(
    q: jax.Array | Projected, kv: LayerKV, metadata: AttentionMetadata, plan: GpuPlan, gpu: Gpu, options: dict
) -> tuple[jax.Array, LayerKV]:
    config = _decode_config(q.queries(kv) if isinstance(q, Projected) else q, kv, gpu)
    step = metadata.page_table, plan.decoded_lens
    if isinstance(config, MosaicDecodeConfig):
        assert isinstance(plan.decode, DecodePlan) and not isinstance(q, Projected)
        return decode_attention_mosaic(q, kv, *step, plan=plan.decode, config=config, **options), kv
    assert isinstance(plan.decode, jax.Array)
    return decode_attention_triton(q, kv, *step, items=plan.decode, arrivals=plan.arrivals, config=config, **options)


def _decode_config(q: Queries, kv: LayerKV, gpu: Gpu) -> MosaicDecodeConfig | TritonDecodeConfig:
    if gpu.only_mosaic:
        return MosaicDecodeConfig.cut(q.shape[2], gpu.num_multiprocessors)
    config = MosaicDecodeConfig.suited(q, kv, gpu.num_multiprocessors) if gpu.is_hopper else None
    return config or TritonDecodeConfig.suited(q, kv, gpu.num_multiprocessors)


def _prefill_config(q: Queries, kv: LayerKV, gpu: Gpu) -> MosaicPrefillConfig | TritonPrefillConfig:
    config = MosaicPrefillConfig.suited(q, kv) if gpu.is_hopper else None
    return config or TritonPrefillConfig.suited(q)
