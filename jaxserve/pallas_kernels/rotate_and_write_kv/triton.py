"""Rotation and KV write for NVIDIA GPUs from sm_80 on, in Pallas-Triton: one pass from the projection to queries and pages.

One program a few tokens and heads, all of them queries, keys or values.
"""

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jaxserve.pallas_kernels.float16 import narrowed
from jaxserve.pallas_kernels.layer_kv import KVScales, LayerKV
from jaxserve.pallas_kernels.metadata import AttentionMetadata


@dataclass(frozen=True)
class RotateConfig:
    """How the kernel is cut: tokens, heads (a power of two that divides the query heads and the KV heads), and warps a program."""

    block_tokens: int
    block_heads: int
    num_warps: int

    @classmethod
    def suited(cls, qkv: jax.Array, kv: LayerKV, deterministic: bool = False) -> "RotateConfig":
        """The cut for qkv [..., T, N] measured best on an H200 (docs/performance_gpu.md): a thread holds 16 bytes of both halves of a head.

        Deterministic: the same for any T, which costs next to nothing.
        """
        _, num_kv_heads, _, head_dim = kv[0].shape
        shared = math.gcd(qkv.shape[-1] // head_dim, num_kv_heads)
        padded_dim = pl.next_power_of_2(head_dim)
        block_heads = min(shared & -shared, max(1, 1024 // padded_dim))
        return cls(4 if qkv.shape[-2] >= 1024 and not deterministic else 1, block_heads, max(1, block_heads * padded_dim // 512))


@functools.partial(jax.jit, static_argnames=("eps", "dtype", "config", "interpret"))
def rotate_and_write_kv_triton(
    qkv: jax.Array,
    rotation: tuple[jax.Array, jax.Array],
    kv: LayerKV,
    metadata: AttentionMetadata,
    *,
    bias: jax.Array | None,
    norms: tuple[jax.Array, jax.Array] | None,
    eps: float,
    dtype: jnp.dtype,
    config: RotateConfig,
    scales: KVScales | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, LayerKV]:
    """As `rotate_and_write_kv`; what a float8 cache cannot hold becomes its largest value, not NaN."""
    _, num_kv_heads, _, head_dim = kv[0].shape
    parts = qkv if qkv.ndim == 3 else qkv[None]
    _, num_tokens, size = parts.shape
    num_heads = size // head_dim - 2 * num_kv_heads
    operands = (*kv, parts, *rotation, metadata.write_pages, metadata.write_offsets, bias, norms, scales)
    q, k, v = pl.pallas_call(
        functools.partial(_rotate_kernel, eps=eps, block_tokens=config.block_tokens, block_heads=config.block_heads),
        grid=(pl.cdiv(num_tokens, config.block_tokens), (num_heads + 2 * num_kv_heads) // config.block_heads),
        in_specs=jax.tree.map(lambda _: pl.no_block_spec, operands),
        out_specs=(pl.no_block_spec,) * 3,
        out_shape=(
            jax.ShapeDtypeStruct((num_tokens, num_heads, head_dim), dtype),
            *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in kv),
        ),
        input_output_aliases={0: 1, 1: 2},
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=1),
        interpret=interpret,
        name="rotate_and_write_kv",
    )(*operands)
    return q, (k, v)


def _rotate_kernel(
    old_keys_ref, old_values_ref, parts_ref, cos_ref, sin_ref, write_pages_ref, write_offsets_ref, bias_ref, norm_refs, scale_refs,
    q_ref, keys_ref, values_ref, *, eps: float, block_tokens: int, block_heads: int,
):  # fmt: skip
    del old_keys_ref, old_values_ref  # the same memory as keys_ref, values_ref
    num_tokens, num_heads, head_dim = q_ref.shape
    num_pages, num_kv_heads = keys_ref.shape[:2]
    half = head_dim // 2
    tile = block_heads, pl.next_power_of_2(half)
    begin = pl.program_id(1) * block_heads
    head, lane = (lax.broadcasted_iota(jnp.int32, tile, axis) for axis in (0, 1))
    head, inside = begin + head, lane < half

    def load(ref, *place):
        """Both halves of some heads. Every index has the shape of the tile, so that nothing moves between threads."""
        *rest, last = place
        return [plt.load(ref.at[(*rest, last + at)], mask=inside, other=0) for at in (0, half)]

    def read(token):
        halves = load(parts_ref, jnp.int32(0), token, head * head_dim + lane)
        if parts_ref.shape[0] > 1:
            halves = [x.astype(jnp.float32) for x in halves]
            for part in range(1, parts_ref.shape[0]):
                more = load(parts_ref, jnp.int32(part), token, head * head_dim + lane)
                halves = [x + y.astype(jnp.float32) for x, y in zip(halves, more, strict=True)]
        halves = [narrowed(x, q_ref.dtype) for x in halves]
        if bias_ref is None:
            return halves
        bias = load(bias_ref, head * head_dim + lane)
        return [narrowed(x.astype(jnp.float32) + b.astype(jnp.float32), q_ref.dtype) for x, b in zip(halves, bias, strict=True)]

    # Tokens beyond the last repeat it. All are read before any is written: the compiler cannot know that no page is part of qkv.
    tokens = [jnp.minimum(pl.program_id(0) * block_tokens + i, num_tokens - 1) for i in range(block_tokens)]
    tokens = [(token, *read(token)) for token in tokens]

    def turned(token, x, y, norm_ref, factor=None):
        dtype = x.dtype
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        if norm_ref is not None:
            scale = lax.rsqrt(jnp.sum(x * x + y * y, axis=1, keepdims=True) / head_dim + eps)
            x, y = (
                ((z * scale).astype(dtype) * weight.astype(dtype)).astype(jnp.float32)
                for z, weight in zip((x, y), load(norm_ref, lane), strict=True)
            )
        cos, sin = (plt.load(ref.at[token, 0, lane], mask=inside, other=0) for ref in (cos_ref, sin_ref))
        halves = x * cos - y * sin, y * cos + x * sin
        return [narrowed(z if factor is None else z * factor, dtype) for z in halves]

    def store(ref, place, halves):
        for x, at in zip(halves, (0, half), strict=True):
            plt.store(ref.at[(*place, lane + at)], x.astype(ref.dtype), mask=inside)

    def write(pages_ref, first_head, scale_ref, token, *halves):
        page = write_pages_ref[token]
        if scale_ref is not None:
            scale = plt.load(scale_ref.at[head - first_head])
            halves = [x.astype(jnp.float32) / scale for x in halves]

        @pl.when(page < num_pages)
        def _():
            store(pages_ref, (page, head - first_head, write_offsets_ref[token]), halves)

    query_norm, key_norm = norm_refs or (None, None)
    key_scale, value_scale = scale_refs or (None, None)

    @pl.when(begin < num_heads)
    def _():
        factor = None if key_scale is None else plt.load(key_scale.at[head // (num_heads // num_kv_heads)])
        for token, first, second in tokens:
            store(q_ref, (token, head), turned(token, first, second, query_norm, factor))

    @pl.when((begin >= num_heads) & (begin < num_heads + num_kv_heads))
    def _():
        for token, first, second in tokens:
            write(keys_ref, num_heads, key_scale, token, *turned(token, first, second, key_norm))

    @pl.when(begin >= num_heads + num_kv_heads)
    def _():
        for token, *halves in tokens:
            write(values_ref, num_heads + num_kv_heads, value_scale, token, *halves)
