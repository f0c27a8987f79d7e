"""Products with a weight: XLA's, and the kernel for Hopper GPUs, interpreted on small shapes and lowered for CUDA at serving shapes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh

from jaxserve.pallas_kernels import add_matmul, add_parts, gated_matmul, matmul, matmul_parts, multiply_gated
from jaxserve.pallas_kernels.gpu import Gpu
from jaxserve.pallas_kernels.matmul import api
from jaxserve.pallas_kernels.matmul.fixed_order import column_splits, fixed_order_kernel
from jaxserve.pallas_kernels.matmul.mosaic import MosaicMatmulConfig, matmul_mosaic
from jaxserve.pallas_kernels.matmul.mosaic_wide import WideMatmulConfig, add_matmul_wide, matmul_wide

BF16, F16 = jnp.bfloat16, jnp.float16
UNOPTIMISED = {"xla_backend_optimization_level": 0}
LLAMA_8B = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]


def normal(num_tokens, size, depth):
    rng = np.random.default_rng(num_tokens)
    return rng.standard_normal((num_tokens, depth), np.float32), rng.standard_normal((size, depth), np.float32)


def relative_error(out, x, weight):
    expected = x.astype(np.float32) @ weight.astype(np.float32).T
    if out.shape[1] != weight.shape[0]:
        gate, up = np.split(expected, 2, axis=1)
        expected = gate / (1 + np.exp(-gate)) * up
    return np.linalg.norm(np.asarray(out, np.float32) - expected) / np.linalg.norm(expected)


KERNEL_CASES = [
    (3, 192, 256, MosaicMatmulConfig(64, 2, 64, 2, 4), False, BF16),  # two partial sums, blocks with one chunk and with two, padded tokens
    (16, 256, 192, MosaicMatmulConfig(128, 1, 64, 2, 1), False, F16),  # one block walks all tiles
    (16, 256, 256, MosaicMatmulConfig(64, 2, 64, 2, 4, cluster=2), False, F16),
    (5, 512, 128, MosaicMatmulConfig(128, 1, 64, 2, 4, cluster=2), True, F16),  # as in a bfloat16 model, which gets bfloat16
]


@pytest.mark.parametrize("num_tokens, size, depth, config, gated, dtype", KERNEL_CASES)
def test_the_kernel_for_few_tokens_multiplies(num_tokens, size, depth, config, gated, dtype):
    x, weight = (jnp.asarray(a, dtype) for a in normal(num_tokens, size, depth))
    out_dtype = BF16 if gated else dtype
    call = functools.partial(matmul_mosaic, config=config, gated=gated, out_dtype=out_dtype, interpret=True)
    call = jax.jit(call, compiler_options=UNOPTIMISED)
    parts = call(x, weight)
    assert parts.shape == (1 if config.splits == 1 else 2 * config.splits, num_tokens, size // 2 if gated else size)
    assert parts.dtype == out_dtype
    out = parts.astype(jnp.float32).sum(axis=0)
    error = relative_error(out, np.asarray(x), np.asarray(weight))
    assert error < (2.5e-3 if out_dtype == BF16 else 3e-4)  # half of the last bit


WIDE_CASES = [
    (260, 256, 64, WideMatmulConfig(2, 64, 64, 1, 2, 2, panel=2), True),  # padded tokens, blocks with several tiles, an uneven panel
    (200, 128, 256, WideMatmulConfig(2, 128, 64, 2, 2, 1), False),  # partial sums
    (256, 96, 128, WideMatmulConfig(2, 64, 48, 1, 2, 8, 2, 2), False),  # fetches shared both ways, rows that no power of two divides
    (192, 64, 128, WideMatmulConfig(3, 64, 32, 1, 2, 4, 2), False),
]

ADDED_CASES = [
    (512, 128, 128, WideMatmulConfig(2, 64, 64, 1, 2, 2, token_cluster=2, panel=1, out_slots=2)),  # one cluster walks all tiles
    (256, 96, 64, WideMatmulConfig(2, 128, 96, 1, 2, 4, out_slots=3)),
]


@pytest.mark.parametrize("num_tokens, size, depth, config, gated", WIDE_CASES)
def test_the_kernel_for_many_tokens_multiplies(num_tokens, size, depth, config, gated):
    x, weight = (jnp.asarray(a, F16 if gated else BF16) for a in normal(num_tokens, size, depth))
    call = functools.partial(matmul_wide, config=config, gated=gated, out_dtype=BF16 if gated else None, interpret=True)
    out = jax.jit(call, compiler_options=UNOPTIMISED)(x, weight)
    assert out.dtype == (jnp.float32 if config.splits > 1 else BF16)
    out = out.astype(jnp.float32).reshape(-1, *out.shape[-2:]).sum(axis=0)
    assert out.shape == (num_tokens, size // 2 if gated else size)
    assert relative_error(out, np.asarray(x), np.asarray(weight)) < 2.5e-3


@pytest.mark.parametrize("num_tokens, size, depth, config", ADDED_CASES)
def test_a_product_adds_itself_to_the_stream(monkeypatch, num_tokens, size, depth, config):
    """Each sum once. The interpreter knows no reducing stores: here one reads, adds and writes at once."""

    def add(source, target, reduction_op=None):
        assert reduction_op == "add"
        target[...] += source[...]

    monkeypatch.setattr(plgpu, "copy_smem_to_gmem", add)
    x, weight = (jnp.asarray(a, BF16) for a in normal(num_tokens, size, depth))
    residual = np.random.default_rng(1).standard_normal((num_tokens, size), np.float32)
    call = functools.partial(add_matmul_wide, config=config, interpret=True)
    out = jax.jit(call, compiler_options=UNOPTIMISED)(x, weight, jnp.asarray(residual))
    assert (out.dtype, out.shape) == (jnp.float32, residual.shape)
    product = np.asarray(x, np.float32) @ np.asarray(weight, np.float32).T
    np.testing.assert_allclose(out, residual + product, atol=1e-4 * depth**0.5)


@pytest.mark.parametrize("gated", [False, True])
def test_the_kernel_for_many_tokens_multiplies_eight_bit_numbers(gated):
    x, weight = (jnp.asarray(a, jnp.float8_e4m3fn) for a in normal(130, 256, 128))
    scales = tuple(jnp.asarray(np.random.default_rng(n).uniform(0.1, 0.4, n), jnp.float32) for n in (130, 256))
    call = functools.partial(matmul_wide, config=WideMatmulConfig(2, 64, 64, 1, 2, 4, 2), gated=gated, interpret=True)
    out = jax.jit(call, compiler_options=UNOPTIMISED)(x, weight, scales)
    assert (out.dtype, out.shape) == (jnp.bfloat16, (1, 130, 128 if gated else 256))
    wide = [np.asarray(a.astype(jnp.float32)) * np.asarray(scale)[:, None] for a, scale in zip((x, weight), scales, strict=True)]
    assert relative_error(out[0].astype(jnp.float32), *wide) < 2.5e-3


@pytest.mark.parametrize("num_tokens", [3, 16])
def test_xla_multiplies(num_tokens):
    x, weight = normal(num_tokens, 24, 40)
    assert relative_error(matmul(jnp.asarray(x), jnp.asarray(weight), jnp.float32), x, weight) < 1e-6


@pytest.mark.parametrize("size, depth, gated, out_dtype", [(128, 256, False, None), (256, 64, True, BF16), (128, 64, False, jnp.float32)])
def test_a_token_gets_the_same_parts_however_many_there_are(size, depth, gated, out_dtype):
    """Of small integers, whose sums are exact: the interpreter adds up as it likes, tensor cores do not."""
    rng, most = np.random.default_rng(size), 2 if gated else 9
    x, weight = (jnp.asarray(rng.integers(-most, most + 1, shape), F16 if gated else BF16) for shape in ((136, depth), (size, depth)))
    found = []
    for num_tokens in (3, 72, 136):
        kernel = fixed_order_kernel(x[:num_tokens], weight, 4, gated=gated, out_dtype=out_dtype)
        parts = jax.jit(functools.partial(kernel, interpret=True), compiler_options=UNOPTIMISED)(x[:num_tokens], weight)
        found.append(parts[:, :3])
        assert parts.shape == (1 if gated or out_dtype else 4, num_tokens, size // 2 if gated else size)
    assert len({np.asarray(parts).tobytes() for parts in found}) == 1
    assert relative_error(add_parts(found[0], jnp.float32), np.asarray(x[:3]), np.asarray(weight)) < (4e-3 if gated else 1e-6)


@pytest.mark.parametrize("num_tokens", [16, 64, 128, 256, 1024])
@pytest.mark.parametrize("size, depth", [*LLAMA_8B, (3072, 2048), (2048, 2048), (896, 4864), (151936, 896), (3584, 18944)])
def test_the_cut_of_a_fixed_order_does_not_depend_on_the_tokens(num_tokens, size, depth):
    splits = column_splits(size, depth, 132)
    for gated in (False, True) if size % 128 == 0 else (False,):
        kernel = fixed_order_kernel(*abstract(num_tokens, size, depth), 132, gated=gated)
        assert isinstance(kernel, functools.partial)
        config = kernel.keywords["config"]
        assert config.splits == (1 if gated else splits) and depth % (splits * 64) == 0
        units = size // 2 if gated else size
        width = (config.tile if num_tokens <= 128 else config.rows) // (2 if gated else 1)
        assert units % (width * (config.cluster if num_tokens <= 128 else config.row_cluster)) == 0
        assert config.in_order if num_tokens <= 128 else config.in_planes == (config.splits > 1)


def abstract(num_tokens, size, depth, dtype=jnp.bfloat16) -> tuple[Any, Any]:
    return jax.ShapeDtypeStruct((num_tokens, depth), dtype), jax.ShapeDtypeStruct((size, depth), dtype)


@pytest.mark.parametrize("num_tokens", [1, 8, 24, 64, 72, 128])
@pytest.mark.parametrize("size, depth", [*LLAMA_8B, (2048, 8192), (128256, 4096), (1280, 20480), (19456, 2560), (8192, 3584)])
def test_the_cut_for_few_tokens_fits(num_tokens, size, depth):
    config = MosaicMatmulConfig.suited(*abstract(num_tokens, size, depth), 132)
    assert config is not None
    lanes = -(-num_tokens // 8) * 8
    assert size % (config.tile * config.cluster) == 0 and depth % (config.splits * config.block_k) == 0
    in_flight = 2 * (config.tile + lanes) * config.block_k * config.num_stages
    assert 96 * 1024 <= in_flight <= 227 * 1024 - 2 * lanes * 64 * 2
    assert config.tile * lanes <= 128 * 128  # float32 sums: half of the registers
    assert size // config.tile * config.splits >= 90


def test_a_gated_product_is_whole_and_has_both_halves_in_a_tile():
    for num_tokens in (8, 128):
        config = MosaicMatmulConfig.suited(*abstract(num_tokens, *LLAMA_8B[2]), 132, gated=True)
        assert config is not None and (config.tile, config.splits) == (128, 1)
    assert MosaicMatmulConfig.suited(*abstract(64, 3584, 4736), 132, gated=True) is None  # it would be cut by columns


@pytest.mark.parametrize("size, depth, gated, tiles", [(*LLAMA_8B[2], True, 256), (*LLAMA_8B[3], False, 128)])
def test_the_cut_for_many_tokens_fills_whole_rounds(size, depth, gated, tiles):
    config = WideMatmulConfig.suited(*abstract(256, size, depth), 132, gated)
    assert config is not None
    assert size // config.rows * config.splits * (256 // config.token_tile) == tiles and size % (config.rows * config.row_cluster) == 0
    assert 256 % (config.token_tile * config.token_cluster) == 0
    assert depth % (config.splits * 64) == 0
    assert 128 * (config.token_tile + config.rows) * config.num_stages <= 200 * 1024


def test_what_is_not_measured_is_left_to_xla():
    for num_tokens, size, depth, dtype in (
        (64, 3072, 2048, jnp.bfloat16),
        (16, 1024, 2048, jnp.bfloat16),
        (64, *LLAMA_8B[3], jnp.float32),
        (129, *LLAMA_8B[3], jnp.bfloat16),
        (129, *LLAMA_8B[3], jnp.float16),
    ):
        assert MosaicMatmulConfig.suited(*abstract(num_tokens, size, depth, dtype), 132) is None
    for num_tokens, (size, depth) in ((224, LLAMA_8B[3]), (512, LLAMA_8B[3]), (256, LLAMA_8B[0]), (256, LLAMA_8B[1])):
        assert WideMatmulConfig.suited(*abstract(num_tokens, size, depth), 132) is None


def multiply(x, weight):
    return matmul(x, weight, x.dtype)


def lowered(num_tokens, size, depth, product=multiply) -> str:
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        return jax.jit(product).trace(*abstract(num_tokens, size, depth)).lower(lowering_platforms=("cuda",)).as_text()


def test_a_hopper_gpu_takes_the_kernels_for_batches(monkeypatch):
    monkeypatch.setattr(api, "local_gpu", lambda: Gpu(132, True))
    gate_up, down = LLAMA_8B[2:]
    for case in ((1, *down), (64, *gate_up), (128, *down), (256, *down), (256, *gate_up, gated_matmul), (2048, *gate_up, gated_matmul)):
        text = lowered(*case)
        assert text.count("custom_call @mosaic_gpu_v2") == 1 and "dot_general" not in text
    for case in (
        (512, *down),
        (2048, *gate_up),
        (512, *gate_up, gated_matmul),
        (64, 128256, 2048, functools.partial(matmul, out_dtype=jnp.float32)),
    ):
        assert "mosaic_gpu_v2" not in lowered(*case)
    monkeypatch.setattr(api, "local_gpu", lambda: Gpu(108, False))
    assert "mosaic_gpu_v2" not in lowered(64, *down)


@pytest.mark.parametrize("num_tokens, size, depth", [(2048, *LLAMA_8B[1]), (3072, *LLAMA_8B[1]), (8192, *LLAMA_8B[1])])
def test_products_of_many_tokens_add_themselves(monkeypatch, num_tokens, size, depth):
    monkeypatch.setattr(api, "local_gpu", lambda: Gpu(132, True))
    x, weight = abstract(num_tokens, size, depth)
    residual = jax.ShapeDtypeStruct((num_tokens, size), jnp.float32)
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        text = jax.jit(add_matmul, donate_argnums=2).trace(x, weight, residual).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu_v2") == 1 and "output_operand_alias" in text
    assert jax.eval_shape(functools.partial(add_matmul, fixed_order=True), x, weight, residual) is None


def test_where_adding_does_not_pay_the_reader_adds():
    for num_tokens, size, depth, dtype, stream in (
        (1024, *LLAMA_8B[1], BF16, jnp.float32),
        (8192, *LLAMA_8B[3], BF16, jnp.float32),  # deep
        (2304, *LLAMA_8B[1], BF16, jnp.float32),  # a third round of tiles for a fifth of the multiprocessors
        (4096, *LLAMA_8B[1], BF16, BF16),
        (4096, *LLAMA_8B[1], F16, jnp.float32),
        (4096, 2048, 2048, BF16, jnp.float32),
    ):
        residual: Any = jax.ShapeDtypeStruct((num_tokens, size), stream)
        assert WideMatmulConfig.suited_to_add(*abstract(num_tokens, size, depth, dtype), residual, 132) is None


def test_gated_products_of_a_fixed_order_lower(monkeypatch):
    """Feed-forward units of which no power of two is a multiple of what keeps a GPU busy: Qwen2.5-14B's and TinyLlama's."""
    monkeypatch.setattr(api, "local_gpu", lambda: Gpu(132, True))
    product = functools.partial(gated_matmul, fixed_order=True)
    for units, depth in ((13824, 5120), (5632, 2048)):
        assert "custom_call @mosaic_gpu_v2" in lowered(512, 2 * units, depth, product)


def test_gated_in_another_dtype_is_finite():
    """Gate and up that a product in float16 cannot hold, as a library gives them."""
    gate = np.asarray([[np.inf, -np.inf, -np.inf, 1, 2, 60000]], np.float16)
    up = np.asarray([[1, np.inf, 0, -np.inf, 3, 60000]], np.float16)
    out = multiply_gated(jnp.asarray(np.concatenate([gate, up], axis=1)), jnp.dtype(BF16))
    assert out.dtype == BF16
    expected = [65504, 0, 0, -65504 / (1 + np.exp(-1)), 6 / (1 + np.exp(-2)), 3.6e9]
    np.testing.assert_allclose(np.asarray(out, np.float32)[0], expected, rtol=2**-8)


def test_parts_add_up_to_the_product():
    x, weight = (jnp.asarray(a) for a in normal(3, 24, 40))
    assert relative_error(add_parts(matmul_parts(x, weight), x.dtype), x, weight) < 1e-6
    assert relative_error(gated_matmul(x, weight), np.asarray(x), np.asarray(weight)) < 1e-6
    parts = jnp.asarray(np.random.default_rng(0).standard_normal((4, 3, 24)), jnp.float32)
    np.testing.assert_allclose(add_parts(parts, jnp.dtype(jnp.float32)), np.asarray(parts).sum(0), atol=1e-6)
