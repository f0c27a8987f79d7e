"""Speed of the attention kernels on this GPU, beside the floor and the rivals: `python -m benchmarks.kernels [--results FILE]`.

A figure is the time of one layer in a chain of layers inside one jit, each with pages of its own (more than the L2 cache holds) and the
output of the one before as its queries: what a layer costs in a step, launches and the combination of partial results included. A call's
output is the next call's donated queries, so that addresses stay and the CUDA graph is replayed as it is, as in a server's steps. Each
kernel is compared first with the reference in float32 at highest precision on a small step of the same heads. Bytes are those
of K and V, operations those of visible scores.
"""

import argparse
import functools
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.rows import add_row_flags, make_rows
from jaxserve.pallas_kernels import AttentionMetadata, LayerKV, layer_kv_shape, paged_attention, plan_attention
from jaxserve.pallas_kernels.gpu import Gpu, local_gpu
from jaxserve.pallas_kernels.paged_attention.api import IMPLEMENTATIONS
from jaxserve.pallas_kernels.paged_attention.gpu import paged_attention_gpu, plan_attention_gpu
from jaxserve.pallas_kernels.paged_attention.reference import paged_attention_reference
from jaxserve.pallas_kernels.paged_attention.xla import paged_attention_xla
from jaxserve.pallas_kernels.paged_attention.xla_plan import plan_xla

READ_FLOOR_TBPS, MATMUL_FLOOR_TFLOPS = 4.5, 815.0  # measured on an H200: a sum over an array, a bfloat16 product of 8192-square matrices
OURS = ("served", *IMPLEMENTATIONS[1:])
Attention = Callable[[jax.Array, LayerKV, AttentionMetadata], jax.Array]


@dataclass(frozen=True)
class Shape:
    """A step to measure: its rows as (tokens in the step, tokens in the cache), its heads, the type of its cache."""

    name: str
    rows: tuple[tuple[int, int], ...]
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16
    kv_dtype: str = "bfloat16"

    @property
    def decode_only(self) -> bool:
        return all(tokens == 1 for tokens, _ in self.rows)

    @property
    def num_bytes(self) -> int:
        return sum(kv for _, kv in self.rows) * 2 * self.num_kv_heads * self.head_dim * jnp.dtype(self.kv_dtype).itemsize

    @property
    def num_operations(self) -> int:
        return sum(tokens * (kv - tokens) + tokens * (tokens + 1) // 2 for tokens, kv in self.rows) * 4 * self.num_heads * self.head_dim


def _lengths(count: int, longest: int) -> tuple[tuple[int, int], ...]:
    rng = np.random.default_rng(1)
    return tuple((1, int(length)) for length in np.exp(rng.uniform(np.log(64), np.log(longest), count)))


def _on_a_shard(shape: Shape) -> Shape:
    """The shape as one of 4 tensor shards sees it."""
    return replace(shape, name=shape.name.replace("attention_", "attention_1x4_"), num_heads=8, num_kv_heads=2)


SHAPES = (
    Shape("decode_attention_b64_4k", ((1, 4096),) * 64),
    Shape("decode_attention_b8_4k", ((1, 4096),) * 8),
    Shape("decode_attention_b1_16k", ((1, 16384),)),
    Shape("decode_attention_fp8_b64_4k", ((1, 4096),) * 64, kv_dtype="float8_e4m3fn"),
    Shape("prefill_attention_8k", ((8192, 8192),)),
    Shape("prefill_attention_2k_over_6k", ((2048, 8192),)),
    Shape("decode_attention_b1_1k", ((1, 1152),)),
    Shape("decode_attention_b64_1k", ((1, 1152),) * 64),
    Shape("decode_attention_b256_1k", ((1, 1152),) * 256),
    Shape("decode_attention_d64_b1_1k", ((1, 1152),), head_dim=64),
    Shape("decode_attention_d64_b64_1k", ((1, 1152),) * 64, head_dim=64),
    Shape("decode_attention_d64_b256_1k", ((1, 1152),) * 256, head_dim=64),
    Shape("decode_attention_b128_mixed_to_16k", _lengths(128, 16384)),
    Shape("decode_attention_page64_b64_4k", ((1, 4096),) * 64, page_size=64),
    Shape("decode_attention_fp8_b8_4k", ((1, 4096),) * 8, kv_dtype="float8_e4m3fn"),
    Shape("decode_attention_d64_b64_4k", ((1, 4096),) * 64, head_dim=64),
    Shape("prefill_attention_4x2k", ((2048, 2048),) * 4),
    Shape("prefill_attention_d64_8k", ((8192, 8192),), head_dim=64),
)
SHAPES += tuple(_on_a_shard(shape) for shape in SHAPES[:9] if shape.kv_dtype == "bfloat16")


def make_step(shape: Shape, num_layers: int) -> tuple[jax.Array, tuple[LayerKV, ...], AttentionMetadata]:
    """Random queries [T, H, D], pages of `num_layers` layers, and the metadata of the step, pages in random order."""
    num_rows, pages_per_row = len(shape.rows), -(-max(kv for _, kv in shape.rows) // shape.page_size)
    needed = [-(-kv // shape.page_size) for _, kv in shape.rows]
    pages = np.random.default_rng(0).permutation(sum(needed)).astype(np.int32)
    table = np.zeros((num_rows, pages_per_row), np.int32)
    for row, (begin, count) in enumerate(zip(np.cumsum(needed) - needed, needed, strict=True)):
        table[row, :count] = pages[begin : begin + count]
    starts = np.concatenate([[0], np.cumsum([tokens for tokens, _ in shape.rows])])
    unused = jnp.zeros((int(starts[-1]),), jnp.int32)
    metadata = AttentionMetadata(
        jnp.asarray(table),
        jnp.asarray([kv for _, kv in shape.rows], jnp.int32),
        jnp.asarray(starts, jnp.int32),
        unused,
        unused,
        decode_only=shape.decode_only,
    )
    size = layer_kv_shape(sum(needed), shape.page_size, shape.num_kv_heads, shape.head_dim)

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def normal(seed, shape, dtype):
        return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16).astype(dtype)

    dtype = jnp.dtype(shape.kv_dtype)
    layers = tuple((normal(2 * i + 1, size, dtype), normal(2 * i + 2, size, dtype)) for i in range(num_layers))
    return normal(0, (int(starts[-1]), shape.num_heads, shape.head_dim), jnp.dtype(jnp.bfloat16)), layers, metadata


@functools.cache
def _small_step(shape: Shape) -> tuple[jax.Array, LayerKV, AttentionMetadata, jax.Array]:
    """A small step of a shape's heads, and the reference's output, float32 at highest precision."""
    q, (kv,), metadata = make_step(shape, 1)
    with jax.default_matmul_precision("highest"):
        reference = functools.partial(paged_attention_reference, scale=shape.head_dim**-0.5, window=None, soft_cap=None)
        return q, kv, metadata, jax.jit(reference)(q.astype(jnp.float32), kv, metadata)


def relative_error(contender: "Contender", shape: Shape) -> float:
    """Relative L2 distance to the reference on a small step of the shape's heads; NaN where anything is."""
    rows = ((1, 700), (1, 65), (1, 2048), (1, 1)) if shape.decode_only else ((100, 300), (1, 500), (37, 37))
    if contender.one_fresh_prompt:
        rows = ((256, 256),)
    q, kv, metadata, expected = _small_step(replace(shape, name="", rows=rows))
    poison = jnp.full((1 << 26,), jnp.nan, jnp.float32).block_until_ready()
    del poison
    out = jax.jit(contender.attention)(q, contender.prepare(kv, metadata), metadata).astype(jnp.float32)
    return float(jnp.linalg.norm(out - expected) / jnp.linalg.norm(expected))


def seconds_per_layer(contender: "Contender", shape: Shape) -> float:
    """Median over repetitions of the time of a layer in a chain of layers."""
    num_layers = 4 if shape.num_operations > 1e11 else 8 if shape.num_bytes > 5e8 else 32
    num_pools = max(2, min(num_layers, -(-600_000_000 // shape.num_bytes)))
    q, pools, metadata = make_step(shape, num_pools)
    pools = tuple(contender.prepare(kv, metadata) for kv in pools)
    layer = jax.jit(contender.attention)

    @functools.partial(jax.jit, donate_argnums=0)
    def chain(q, pools, metadata):
        metadata = contender.plan(metadata, q, pools[0])
        for i in range(num_layers):
            q = layer(q, pools[i % num_pools], metadata)
        return q

    compiled = chain.lower(q, pools, metadata).compile()
    q = compiled(q, pools, metadata).block_until_ready()
    started = time.perf_counter()
    q = compiled(q, pools, metadata).block_until_ready()
    repetitions = max(3, int(0.03 / (time.perf_counter() - started)))
    times = []
    for _ in range(9):
        started = time.perf_counter()
        for _ in range(repetitions):  # in the same memory each time, as a server's steps: a CUDA graph is then replayed and not changed
            q = compiled(q, pools, metadata)
        q.block_until_ready()
        times.append((time.perf_counter() - started) / repetitions / num_layers)
    return statistics.median(times)


@dataclass(frozen=True)
class Contender:
    """One way to compute a step.

    Attributes:
        prepare: brings a layer's pages to the form it wants; not timed.
        plan: lays out a step for all layers.
    """

    name: str
    attention: Attention
    prepare: Callable[[LayerKV, AttentionMetadata], LayerKV] = lambda kv, _: kv
    plan: Callable[[AttentionMetadata, jax.Array, LayerKV], AttentionMetadata] = lambda metadata, *_: metadata
    one_fresh_prompt: bool = False


def one_contender(shape: Shape, attention: str) -> list[Contender]:
    """What serves with `--attention`."""
    options = dict(scale=shape.head_dim**-0.5, window=None, soft_cap=None, implementation=attention)
    plan = functools.partial(plan_attention, window=None, implementation=attention)
    return [Contender(attention, functools.partial(paged_attention, **options), plan=plan)]


def contenders(shape: Shape, gpu: Gpu) -> list[Contender]:
    """What serves on this GPU, our kernels for GPUs that are no Hopper, and what others made."""
    options = dict(scale=shape.head_dim**-0.5, window=None, soft_cap=None)

    def ours(name: str, gpu: Gpu) -> Contender:
        def plan(metadata, q, kv):
            return replace(metadata, plan=plan_attention_gpu(metadata, q, kv, window=None, gpu=gpu))

        return Contender(name, functools.partial(paged_attention_gpu, gpu=gpu, **options), plan=plan)

    found = [ours("served", gpu), ours("triton", Gpu(gpu.num_multiprocessors, is_hopper=False))]
    if shape.name in ("decode_attention_b64_4k", "decode_attention_b8_4k", "decode_attention_b1_16k"):

        def stock(q, kv, metadata):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention as stock_paged_attention
            return stock_paged_attention(q * options["scale"], *kv, metadata.page_table, metadata.kv_lens)

        def xla(q, kv, metadata):
            plan = plan_xla(metadata, page_size=shape.page_size, window=None)
            return paged_attention_xla(q, kv, plan, **options)

        found.append(Contender("stock Pallas", stock, lambda kv, _: (kv[0].swapaxes(0, 1), kv[1].swapaxes(0, 1))))
        found.append(Contender("XLA", xla))
    if len(shape.rows) == 1 and shape.rows[0][0] == shape.rows[0][1]:

        def in_order(kv, metadata):
            keys, values = (pages[metadata.page_table[0]].swapaxes(1, 2).reshape(1, -1, *pages.shape[1::2]) for pages in kv)
            return keys, values

        def cudnn(q, kv, _):
            return jax.nn.dot_product_attention(q[None], *kv, is_causal=True, scale=options["scale"], implementation="cudnn")[0]

        found.append(Contender("cuDNN", cudnn, in_order, one_fresh_prompt=True))
    return found


def figure(shape: Shape, seconds: float) -> tuple[str, float, str, float]:
    """Name, value and unit of a measured time, and the share of the floor."""
    if not shape.decode_only:
        tflops = shape.num_operations / seconds / 1e12
        return f"{shape.name}_tflops", tflops, "TFLOP/s", tflops / MATMUL_FLOOR_TFLOPS
    tbps = shape.num_bytes / seconds / 1e12
    if shape.kv_dtype != "bfloat16":
        return f"{shape.name}_us", seconds * 1e6, "us", tbps / READ_FLOOR_TBPS
    return f"{shape.name}_tbps", tbps, "TB/s", tbps / READ_FLOOR_TBPS


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the attention kernels on this GPU.")
    parser.add_argument("--only", default="", help="measure the shapes whose name contains this")
    parser.add_argument("--attention", choices=IMPLEMENTATIONS[1:], help="measure what serves with this flag, and nothing beside it")
    add_row_flags(parser)
    arguments = parser.parse_args()
    gpu = local_gpu()
    if gpu is None:
        sys.exit("benchmarks.kernels needs an NVIDIA GPU")
    rows = make_rows(arguments, jax.local_devices()[0].device_kind)
    wrong = False
    for shape in (shape for shape in SHAPES if arguments.only in shape.name):
        for contender in one_contender(shape, arguments.attention) if arguments.attention else contenders(shape, gpu):
            try:
                seconds, error = seconds_per_layer(contender, shape), relative_error(contender, shape)
            except Exception as failure:  # a rival that does not go must not end the table
                wrong |= contender.name in OURS
                print(f"{shape.name:44s} {contender.name:12s} failed: {str(failure)[:80]!r}", flush=True)
                continue
            name, value, unit, share = figure(shape, seconds)
            times = f"{seconds * 1e6:9.1f} us {value:8.2f} {unit:8s} {share:4.0%} of floor"
            print(f"{name:44s} {contender.name:12s} {times}  error {error:.1e}", flush=True)
            wrong |= not error < 2e-2
            if contender.name in OURS and error < 2e-2:
                row = name if contender.name == "served" else f"{name}_{contender.name}"
                command = f"python -m benchmarks.kernels --only {shape.name}"
                rows.add(row, value, unit, f"{command} --attention {arguments.attention}" if arguments.attention else command)
    if wrong:
        sys.exit("some output is far from the reference")


if __name__ == "__main__":
    main()
