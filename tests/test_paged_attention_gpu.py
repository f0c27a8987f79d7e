"""GPU attention kernels without a GPU: interpreted against the reference on small shapes, and lowered for CUDA at serving shapes."""

import dataclasses
import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh
from projections import make_qkv

from jaxserve.pallas_kernels import AttentionMetadata
from jaxserve.pallas_kernels.gpu import Gpu
from jaxserve.pallas_kernels.paged_attention.decode_items import make_arrivals, plan_items
from jaxserve.pallas_kernels.paged_attention.decode_plan import plan_decode, worker_of_block
from jaxserve.pallas_kernels.paged_attention.gpu import paged_attention_gpu, plan_attention_gpu
from jaxserve.pallas_kernels.paged_attention.mosaic_decode import MosaicDecodeConfig, decode_attention_mosaic
from jaxserve.pallas_kernels.paged_attention.mosaic_prefill import MosaicPrefillConfig, prefill_attention_mosaic
from jaxserve.pallas_kernels.paged_attention.reference import paged_attention_reference
from jaxserve.pallas_kernels.paged_attention.triton_decode import TritonDecodeConfig, decode_attention_triton
from jaxserve.pallas_kernels.paged_attention.triton_prefill import TritonPrefillConfig, prefill_attention_triton
from jaxserve.pallas_kernels.projected import Projected
from jaxserve.pallas_kernels.rotate_and_write_kv.reference import rotate_and_write_kv_reference

UNOPTIMISED = {"xla_backend_optimization_level": 0}  # compiling an interpreted kernel takes longer than running it
PLAIN = dict(window=None, soft_cap=None)
LOCAL = dict(window=37, soft_cap=20.0)
BF16, F16, FLOAT8 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16), jnp.dtype(jnp.float8_e4m3fn)


def make_step(rows, *, num_heads, num_kv_heads, head_dim, page_size, num_tokens=None, dtype: jnp.dtype = BF16, seed=0):
    """A step of rows (tokens in this step, tokens in the cache), pages in random order: q (of 16 bits), kv, metadata."""
    rng = np.random.default_rng(seed)
    pages_per_row = -(-max(kv_len for _, kv_len in rows) // page_size)
    table = rng.permutation(len(rows) * pages_per_row).reshape(len(rows), pages_per_row)
    starts = np.concatenate([[0], np.cumsum([tokens for tokens, _ in rows])])
    num_tokens = num_tokens or int(starts[-1])
    unused = jnp.zeros((num_tokens,), jnp.int32)
    metadata = AttentionMetadata(
        jnp.asarray(table, jnp.int32),
        jnp.asarray([kv_len for _, kv_len in rows], jnp.int32),
        jnp.asarray(starts, jnp.int32),
        unused,
        unused,
    )

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    kv = tuple(normal(table.size, num_kv_heads, page_size, head_dim).astype(dtype) for _ in range(2))
    return normal(num_tokens, num_heads, head_dim).astype(F16 if dtype == FLOAT8 else dtype), kv, metadata


def relative_error(out, q, kv, metadata, **options):
    """Against the reference in float32, over the tokens that are no padding."""
    tokens = int(metadata.query_starts[-1])
    reference = functools.partial(paged_attention_reference, scale=q.shape[-1] ** -0.5, **options)
    expected = jax.jit(reference)(q.astype(jnp.float32), kv, metadata)[:tokens]
    out = out.astype(jnp.float32)
    assert bool(jnp.isfinite(out).all())
    return float(jnp.linalg.norm(out[:tokens] - expected) / jnp.linalg.norm(expected))


DECODE_CASES = [
    (decode_attention_triton, TritonDecodeConfig(32, 2, 1, 12), [70, 130, 0], 8, 2, 64, 16, F16, PLAIN),
    (decode_attention_triton, TritonDecodeConfig(32, 2, 2, 9), [150], 3, 1, 96, 32, FLOAT8, LOCAL),
    (decode_attention_mosaic, MosaicDecodeConfig(64, 2, 3), [70, 0, 130], 4, 1, 64, 16, F16, PLAIN),
    (decode_attention_mosaic, MosaicDecodeConfig(64, 2, 2), [100], 8, 2, 64, 64, BF16, LOCAL),
]


@pytest.mark.parametrize("attention, config, kv_lens, num_heads, num_kv_heads, head_dim, page_size, dtype, options", DECODE_CASES)
def test_decode_is_the_reference(attention, config, kv_lens, num_heads, num_kv_heads, head_dim, page_size, dtype, options):
    rows = [(1, kv_len) for kv_len in kv_lens]
    q, kv, metadata = make_step(rows, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, page_size=page_size, dtype=dtype)
    call = functools.partial(attention, scale=head_dim**-0.5, config=config, out_dtype=BF16, interpret=True, **options)
    out = jax.jit(call, compiler_options=UNOPTIMISED)(q, kv, metadata.page_table, metadata.kv_lens)
    out = out[0] if attention is decode_attention_triton else out
    assert out.dtype == BF16
    used = np.flatnonzero(kv_lens)
    out = np.where((np.asarray(kv_lens) > 0)[:, None, None], out, out * 0)  # what is meaningless must still be finite
    reference = functools.partial(paged_attention_reference, scale=head_dim**-0.5, **options)
    expected = np.asarray(jax.jit(reference)(q.astype(jnp.float32), kv, metadata))
    assert np.isfinite(out.astype(np.float32)).all()
    error = np.linalg.norm(out.astype(np.float32)[used] - expected[used]) / np.linalg.norm(expected[used])
    assert error < 4e-3


PROJECTED_CASES = [
    (32, dict(qk_norms=True, bias=True), TritonDecodeConfig(16, 2, 1, 9), PLAIN),
    (96, dict(qk_norms=True), TritonDecodeConfig(32, 2, 1, 20), dict(window=20, soft_cap=None)),
    (64, dict(kv_dtype=FLOAT8, scaled=True), TritonDecodeConfig(32, 2, 1, 4), PLAIN),
]


@pytest.mark.parametrize("head_dim, traits, config, attention", PROJECTED_CASES, ids=["norms-bias", "odd-size-window", "float8-scaled"])
def test_decode_of_a_projection_rotates_writes_and_attends(head_dim, traits, config, attention):
    """As `rotate_and_write_kv`, then attention: cut pairs, a padding row, a first token, parts."""
    kv_lens, page_size = jnp.asarray([70, 0, 1, 33], jnp.int32), 16
    (qkv, rotation, kv, _), traits = make_qkv(4, 6, 2, head_dim, **({"kv_dtype": F16} | traits))
    options: dict[str, Any] = traits | dict(eps=1e-6, dtype=F16)
    pages = len(kv_lens) * 5
    kv = tuple(jnp.tile(x, (pages // len(x) + 1, 1, 1, 1))[:pages] for x in kv)
    table = jnp.asarray(np.random.default_rng(1).permutation(pages).reshape(4, 5), jnp.int32)
    last = jnp.maximum(kv_lens - 1, 0)
    page = jnp.where(kv_lens > 0, table[jnp.arange(4), last // page_size], pages)
    unused = jnp.arange(5, dtype=jnp.int32)
    metadata = AttentionMetadata(table, kv_lens, unused, page, last % page_size, decode_only=True)
    parts = jnp.stack([qkv, qkv / 3])
    q, written = jax.jit(functools.partial(rotate_and_write_kv_reference, **options))(parts, rotation, kv, metadata)
    scale = dict(scale=head_dim**-0.5)
    with_queries = functools.partial(decode_attention_triton, config=config, interpret=True, **scale, **attention)
    expected = jax.jit(with_queries, compiler_options=UNOPTIMISED)(q, written, table, kv_lens)[0]

    def attend(parts, kv):
        projected = Projected.of(parts, rotation, kv, metadata, **options)
        return decode_attention_triton(projected, kv, table, kv_lens, config=config, interpret=True, **scale, **attention)

    out, got = jax.jit(attend, compiler_options=UNOPTIMISED)(parts, kv)
    assert (np.asarray(written[0], np.float32) != np.asarray(kv[0], np.float32)).any()
    for x, y in zip(got, written, strict=True):
        unit = float(jnp.finfo(x.dtype).eps)
        np.testing.assert_allclose(x.astype(jnp.float32), y.astype(jnp.float32), rtol=2 * unit, atol=unit)
    used = np.flatnonzero(kv_lens)
    apart = np.asarray(out, np.float32)[used] - np.asarray(expected, np.float32)[used]
    assert np.linalg.norm(apart) < (2e-2 if options.get("scales") else 2e-3) * np.linalg.norm(expected[used])


def test_layers_share_the_counters_of_those_who_are_done():
    rows = [(1, 200), (1, 40), (1, 97)]
    q, kv, metadata = make_step(rows, num_heads=4, num_kv_heads=2, head_dim=64, page_size=16)
    attend = functools.partial(decode_attention_triton, config=TritonDecodeConfig(32, 2, 1, 20), scale=0.125, interpret=True, **PLAIN)

    def layers(q):
        arrivals = make_arrivals(3, 2)
        outs = [jax.jit(attend)(q, kv, metadata.page_table, metadata.kv_lens, arrivals=arrivals)[0] for _ in range(2)]
        return outs, arrivals[...]

    outs, counts = jax.jit(layers, compiler_options=UNOPTIMISED)(q)
    assert not counts.any()
    for out in outs:
        assert relative_error(out, q, kv, metadata, **PLAIN) < 4e-3


PREFILL_CASES = [
    (prefill_attention_triton, TritonPrefillConfig(32, 32), 16, F16, LOCAL),
    (prefill_attention_triton, TritonPrefillConfig(64, 64), 32, FLOAT8, PLAIN),
    (prefill_attention_mosaic, MosaicPrefillConfig(64, 2), 32, F16, LOCAL),
]


@pytest.mark.parametrize("attention, config, page_size, dtype, options", PREFILL_CASES)
def test_prefill_is_the_reference(attention, config, page_size, dtype, options):
    rows = [(50, 90), (20, 20), (8, 70)]
    q, kv, metadata = make_step(rows, num_heads=2, num_kv_heads=1, head_dim=64, page_size=page_size, num_tokens=100, dtype=dtype)
    call = functools.partial(attention, scale=64**-0.5, config=config, out_dtype=BF16, interpret=True, **options)
    out = jax.jit(call, compiler_options=UNOPTIMISED)(q, kv, metadata)
    assert out.dtype == BF16
    assert relative_error(out, q, kv, metadata, **options) < 4e-3


def test_mixed_step_sends_each_row_to_its_kernel():
    q, kv, metadata = make_step(
        [(1, 40), (1, 70), (30, 60), (1, 9), (0, 0)], num_heads=4, num_kv_heads=2, head_dim=64, page_size=16, num_tokens=40
    )
    call = functools.partial(paged_attention_gpu, scale=64**-0.5, gpu=Gpu(4, is_hopper=False), interpret=True, **PLAIN)
    out = jax.jit(call, compiler_options=UNOPTIMISED)(q, kv, metadata)
    assert relative_error(out, q, kv, metadata, **PLAIN) < 4e-3


@pytest.mark.parametrize("num_programs", [1, 20, 29, 500])
@pytest.mark.parametrize("window", [None, 100])
def test_items_of_a_plan_cover_each_pair_in_order(window, num_programs):
    kv_lens = [4000, 1, 0, 64, 65, 900, 0]
    plan = functools.partial(plan_items, num_kv_heads=2, block_kv=32, window=window, num_programs=num_programs)
    items = np.asarray(jax.jit(plan)(jnp.asarray(kv_lens, jnp.int32)))
    there = items[:, 6] > 0
    assert len(items) == {1: 4 + 14, 20: 40 + 14, 29: 29, 500: 500}[num_programs]
    places, items = np.flatnonzero(there), items[there]
    np.testing.assert_array_equal(places, np.arange(len(items)))  # the others come last, and have no work
    for row, kv_len in enumerate(kv_lens):
        visible = max(0, kv_len - (window or kv_len))
        for head in range(2):
            mine = np.flatnonzero((items[:, 0] == row) & (items[:, 1] == head))
            begins, ends = items[mine, 2], items[mine, 3]
            assert begins[0] == visible // 32 * 32 and ends[-1] == kv_len and (begins[1:] == ends[:-1]).all()
            assert (begins % 32 == 0).all() and ((begins < ends).all() or kv_len == 0)
            np.testing.assert_array_equal(np.diff(mine), 2)
            np.testing.assert_array_equal(items[mine, 4:7], [[visible, split, len(mine)] for split in range(len(mine))])


def test_items_are_no_more_than_run_at_once():
    plan = functools.partial(plan_items, num_kv_heads=8, block_kv=64, window=None, num_programs=528)
    for num_rows, kv_len, expected in [(40, 1152, 320), (64, 1152, 512), (1, 1152, 72)]:
        items = jax.jit(plan)(jnp.full((num_rows,), kv_len, jnp.int32))
        assert int((items[:, 6] > 0).sum()) == expected


@pytest.mark.parametrize("window", [None, 100])
def test_shares_of_a_plan_cover_all_blocks_equally(window):
    kv_lens = jnp.asarray([4000, 1, 0, 64, 65, 900, 0], jnp.int32)
    plan = jax.jit(functools.partial(plan_decode, num_kv_heads=2, block_kv=64, window=window, num_workers=29))(kv_lens)
    sizes = np.diff(plan.worker_starts)
    assert sizes.min() >= 0 and sizes.max() - sizes.min() <= 1
    total = int(plan.row_starts[-1])
    assert plan.worker_starts[0] == 0 and plan.worker_starts[-1] == total
    owners = np.searchsorted(np.asarray(plan.worker_starts), np.arange(total), side="right") - 1
    np.testing.assert_array_equal(worker_of_block(jnp.arange(total, dtype=jnp.int32), plan.row_starts[-1], 29), owners)
    visible = np.minimum(np.asarray(kv_lens), window or 10**9)
    assert all(np.diff(plan.row_starts) // 2 * 64 >= visible)


def lowered(gpu: Gpu, decode_only: bool, head_dim: int, kv_dtype: jnp.dtype, page_size: int = 16) -> str:
    """StableHLO for CUDA of a layer of a step of 16 rows at serving sizes."""
    num_rows, num_tokens = 16, 16 if decode_only else 2048

    def make_metadata():
        sizes = (num_rows, 512), num_rows, num_rows + 1, num_tokens, num_tokens
        return AttentionMetadata(*(jnp.zeros(size, jnp.int32) for size in sizes), decode_only=decode_only)

    pages = jax.ShapeDtypeStruct((4096, 8, page_size, head_dim), kv_dtype)
    q = jax.ShapeDtypeStruct((num_tokens, 32, head_dim), BF16 if kv_dtype == BF16 else F16)
    call = functools.partial(paged_attention_gpu, scale=head_dim**-0.5, window=1024, soft_cap=30.0, gpu=gpu, out_dtype=BF16)
    layer = jax.jit(call)

    def step(q, kv, metadata):
        metadata = dataclasses.replace(metadata, plan=plan_attention_gpu(metadata, q, kv, window=1024, gpu=gpu))
        return layer(q, kv, metadata)

    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Pallas-Triton is deprecated; nothing else serves GPUs before sm_90
        return jax.jit(step).trace(q, (pages, pages), jax.eval_shape(make_metadata)).lower(lowering_platforms=("cuda",)).as_text()


def test_mosaic_alone_computes_what_triton_is_faster_at():
    text = lowered(Gpu(132, is_hopper=True, only_mosaic=True), decode_only=True, head_dim=64, kv_dtype=F16)
    assert text.count("custom_call @mosaic_gpu_v2") == 1


def test_mosaic_leaves_pages_of_few_tokens_to_triton():
    assert "mosaic_gpu_v2" not in lowered(Gpu(132, is_hopper=True), decode_only=False, head_dim=192, kv_dtype=F16, page_size=4)


@pytest.mark.parametrize("is_hopper", [False, True], ids=["triton", "mosaic"])
@pytest.mark.parametrize("decode_only", [True, False], ids=["decode", "mixed"])
@pytest.mark.parametrize("head_dim, kv_dtype", [(128, F16), (64, BF16), (192, F16), (128, FLOAT8)])
def test_kernels_lower_for_cuda(is_hopper, decode_only, head_dim, kv_dtype):
    text = lowered(Gpu(132, is_hopper), decode_only, head_dim, kv_dtype)
    decode_by_mosaic, prefill_by_mosaic = (
        is_hopper and kv_dtype != FLOAT8 and head_dim == 192,
        is_hopper and kv_dtype != FLOAT8 and not decode_only,
    )
    assert text.count("custom_call @mosaic_gpu_v2") == decode_by_mosaic + prefill_by_mosaic
    assert ("paged_decode_combine" in text) == decode_by_mosaic
    assert ("output_operand_alias<" in text) == (not decode_by_mosaic)  # the counters stay where they are
    assert ("paged_prefill" in text) == (not decode_only and not prefill_by_mosaic)
