"""Products with weights of 4 and 8 bits: packing, the kernels interpreted on small shapes, what is lowered at serving shapes."""

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, PartitionSpec

from jaxserve.pallas_kernels import quantized_add_matmul, quantized_gated_matmul, quantized_matmul, quantized_matmul_parts
from jaxserve.pallas_kernels.gpu import Gpu
from jaxserve.pallas_kernels.matmul import multiply_gated
from jaxserve.pallas_kernels.quantized_matmul import TABLES, EightBitWeight, FourBitWeight, Layout, api, pack_four_bit
from jaxserve.pallas_kernels.quantized_matmul.activations import round_activations, round_rows
from jaxserve.pallas_kernels.quantized_matmul.dispatch import (
    eight_bit_config,
    four_bit_config,
    mosaic_config,
    triton_config,
    widening_config,
)
from jaxserve.pallas_kernels.quantized_matmul.many_tokens import dequantize_triton, eight_bit_matmul
from jaxserve.pallas_kernels.quantized_matmul.mosaic import MosaicQuantizedConfig, quantized_matmul_mosaic, token_tiles
from jaxserve.pallas_kernels.quantized_matmul.mosaic_eight_bit import MosaicEightBitConfig, eight_bit_matmul_mosaic
from jaxserve.pallas_kernels.quantized_matmul.mosaic_four_bit import MosaicFourBitConfig, four_bit_matmul_mosaic
from jaxserve.pallas_kernels.quantized_matmul.mosaic_wide import WideQuantizedConfig, quantized_matmul_wide, wide_token_tiles
from jaxserve.pallas_kernels.quantized_matmul.plain import PlainWeight
from jaxserve.pallas_kernels.quantized_matmul.reference import quantized_matmul_reference
from jaxserve.pallas_kernels.quantized_matmul.triton import TritonQuantizedConfig, quantized_matmul_triton

BF16, F16, F32, FLOAT8 = (jnp.dtype(name) for name in ("bfloat16", "float16", "float32", "float8_e4m3fn"))
NF4: tuple[float, ...] = tuple(TABLES["nf4"].tolist())
COUNTED = tuple(map(float, range(16)))
HALF_OF_THE_LAST_BIT = {BF16: 2.5e-3, F16: 3e-4}


def four_bit(size, depth, group, *, zeros=False, minima=False, values=None) -> FourBitWeight:
    random = np.random.default_rng(depth)
    groups = size, depth // group
    return jax.tree.map(
        jnp.asarray,
        pack_four_bit(
            random.integers(0, 16, (size, depth)),
            random.uniform(0.5, 1.5, groups).astype(np.float16),
            random.integers(0, 17, groups) if zeros else None,
            random.standard_normal(groups).astype(np.float32) if minima else None,
            values=values,
        ),
    )


def eight_bit(size, depth, groups, dtype, **options) -> EightBitWeight:
    random = np.random.default_rng(depth)
    codes = jnp.asarray(random.standard_normal((size, depth)) * (40 if dtype == jnp.int8 else 1)).astype(dtype)
    return EightBitWeight(codes, jnp.asarray(random.uniform(0.5, 1.5, (groups, size)), F32), **options)


def with_zeros(weight: EightBitWeight) -> EightBitWeight:
    zeros = np.random.default_rng(3).integers(-128, 129, weight.scales.shape)
    return dataclasses.replace(weight, zeros=jnp.asarray(zeros, jnp.int16))


def activations(num_tokens, depth, dtype=BF16) -> jax.Array:
    return jnp.asarray(np.random.default_rng(num_tokens).standard_normal((num_tokens, depth)), dtype)


def error(out, x, weight) -> float:
    expected = quantized_matmul_reference(x, weight, F32)
    return float(jnp.linalg.norm(out.astype(F32) - expected) / jnp.linalg.norm(expected))


@pytest.mark.parametrize(("group", "depth", "shards"), [(32, 320, 2), (64, 256, 1), (256, 1024, 2)])
def test_packed_codes_are_the_codes(group, depth, shards):
    random = np.random.default_rng(group)
    codes, scales = random.integers(0, 16, (24, depth)), random.uniform(0.5, 1.5, (24, depth // group)).astype(np.float16)
    zeros = random.integers(0, 17, scales.shape)
    expected = (codes - np.repeat(zeros, group, 1)).astype(np.float32) * np.repeat(scales, group, 1).astype(np.float32)
    weight = jax.tree.map(jnp.asarray, pack_four_bit(codes, scales, zeros, column_shards=shards))
    matrix = np.asarray(weight.dequantize(F32)).reshape(24, shards, -1)
    np.testing.assert_array_equal(matrix[:, :, : depth // shards].reshape(24, depth), expected)
    assert not matrix[:, :, depth // shards :].any()
    rows = weight.rows(jnp.asarray([3, 20]), F32)
    np.testing.assert_array_equal(rows.reshape(2, shards, -1)[:, :, : depth // shards].reshape(2, depth), expected[[3, 20]])


def test_a_group_is_never_cut():
    with pytest.raises(ValueError, match="never cut"):
        pack_four_bit(np.zeros((8, 192), int), np.ones((8, 3), np.float32), column_shards=2)


CUTS = [
    (four_bit(72, 384, 64, zeros=True), 17, F16, TritonQuantizedConfig(64, 16, 2, 2, 4, 2)),  # rows, tokens and columns beyond the last
    (four_bit(64, 256, 32), 3, BF16, TritonQuantizedConfig(32, 16, 1, 1, 2, 2)),
    (four_bit(32, 256, 64, values=NF4), 3, F16, TritonQuantizedConfig(32, 16, 1, 1, 2, 2)),
    (eight_bit(72, 304, 1, FLOAT8), 16, F16, TritonQuantizedConfig(32, 16, 1, 2, 2, 2)),
    (eight_bit(64, 256, 8, jnp.int8), 3, BF16, TritonQuantizedConfig(32, 16, 1, 1, 2, 2)),
    (eight_bit(32, 25, 1, jnp.int8), 3, BF16, TritonQuantizedConfig(32, 16, 1, 1, 2, 2)),
]


@pytest.mark.parametrize(
    ("weight", "num_tokens", "dtype", "config"), CUTS, ids=["zeros", "groups-of-32", "nf4", "float8", "int8", "few-columns"]
)
def test_the_triton_kernel_multiplies(weight, num_tokens, dtype, config):
    x = activations(num_tokens, weight.shape[1], dtype)
    parts = quantized_matmul_triton(x, weight, dtype, config=config, interpret=True)
    assert parts.shape[0] == config.splits and parts.dtype == (dtype if config.splits == 1 else F32)
    assert error(parts.astype(F32).sum(axis=0), x, weight) < HALF_OF_THE_LAST_BIT[dtype]


MOSAIC_CUTS = [
    (four_bit(256, 512, 32, zeros=True), 3, MosaicQuantizedConfig(2, 2, 2, 4), False),
    (four_bit(128, 1024, 256), 3, MosaicQuantizedConfig(2, 2, 2, 4, width=4), False),
    (four_bit(512, 256, 64, zeros=True), 3, MosaicQuantizedConfig(4, 1, 2, 1, width=2), True),  # one block of threads walks both tiles
    (eight_bit(128, 512, 2, jnp.int8), 130, MosaicQuantizedConfig(1, 2, 2, 3, width=2), False),  # two tiles of tokens
]


@pytest.mark.parametrize(("weight", "num_tokens", "config", "gated"), MOSAIC_CUTS, ids=["4-bits", "long-groups", "gated", "int8-groups"])
def test_the_mosaic_kernel_multiplies(weight, num_tokens, config, gated):
    x = activations(num_tokens, weight.shape[1])
    parts = quantized_matmul_mosaic(x, weight, config=config, gated=gated, interpret=True)
    assert parts.shape == (1 if config.splits == 1 else 4, num_tokens, weight.shape[0] // (2 if gated else 1))
    out, expected = parts.astype(F32).sum(axis=0), quantized_matmul_reference(x, weight, F32)
    expected = multiply_gated(expected) if gated else expected
    assert float(jnp.linalg.norm(out - expected) / jnp.linalg.norm(expected)) < (2 if gated else 1) * HALF_OF_THE_LAST_BIT[BF16]


FOUR_BIT_CUTS = [
    (four_bit(128, 256, 32, zeros=True), 3, BF16, MosaicFourBitConfig(2, 1, 1, 2, 1, 2, 2), False),
    (four_bit(256, 256, 64), 12, F16, MosaicFourBitConfig(1, 2, 2, 1, 1, 2, 1), False),  # a block of threads walks two tiles
    (four_bit(128, 512, 128, values=tuple(range(16))), 9, BF16, MosaicFourBitConfig(1, 2, 2, 1, 2, 2, 1), True),
]


@pytest.mark.parametrize(("weight", "num_tokens", "dtype", "config", "gated"), FOUR_BIT_CUTS, ids=["parts", "shares", "gated"])
def test_the_kernel_for_few_tokens_and_four_bits_multiplies(weight, num_tokens, dtype, config, gated):
    x = activations(num_tokens, weight.shape[1], dtype)
    parts = four_bit_matmul_mosaic(x, weight, config=config, gated=gated, interpret=True)
    assert parts.shape == (1 if config.splits == 1 else 4, num_tokens, weight.shape[0] // (2 if gated else 1)) and parts.dtype == dtype
    out, expected = parts.astype(F32).sum(axis=0), quantized_matmul_reference(x, weight, F32)
    expected = multiply_gated(expected) if gated else expected
    assert float(jnp.linalg.norm(out - expected) / jnp.linalg.norm(expected)) < HALF_OF_THE_LAST_BIT[dtype]


EIGHT_BIT_CUTS = [
    (FLOAT8, 5, MosaicEightBitConfig(2, 2, 128, 2, 3), False),
    (FLOAT8, 12, MosaicEightBitConfig(1, 1, 256, 2, 1), True),
    (jnp.int8, 130, MosaicEightBitConfig(1, 1, 256, 2, 4), False),  # two tiles of tokens
]


@pytest.mark.parametrize(("dtype", "num_tokens", "config", "gated"), EIGHT_BIT_CUTS, ids=["parts", "gated", "int8"])
def test_the_kernel_for_eight_bits_multiplies(dtype, num_tokens, config, gated):
    x, weight = activations(num_tokens, 512), eight_bit(256, 512, 1, dtype)
    parts = eight_bit_matmul_mosaic(x, weight, config=config, gated=gated, interpret=True)
    assert parts.shape == (1 if config.splits == 1 else 4, num_tokens, 128 if gated else 256) and parts.dtype == BF16
    out, expected = parts.astype(F32).sum(axis=0), quantized_matmul_reference(x, weight, F32)
    expected = multiply_gated(expected) if gated else expected
    assert float(jnp.linalg.norm(out - expected) / jnp.linalg.norm(expected)) < HALF_OF_THE_LAST_BIT[BF16]


WIDE_CUTS = [
    (four_bit(256, 512, 32, zeros=True), 40, WideQuantizedConfig(2, 256, 2, 3, 2, 2, cluster=2), False),
    (four_bit(384, 256, 256), 70, WideQuantizedConfig(3, 32, 1, 3, 2, 1, panel=2), False),  # three tiles of tokens, a panel not full
    (four_bit(256, 256, 64, zeros=True), 70, WideQuantizedConfig(2, 64, 1, 3, 2, 1, takes_turns=True), True),
    (four_bit(128, 256, 32, minima=True, values=COUNTED), 24, WideQuantizedConfig(2, 32, 1, 3, 2, 1), False),
    (four_bit(128, 256, 64, values=NF4), 24, WideQuantizedConfig(2, 32, 1, 3, 2, 1), True),
    (eight_bit(256, 512, 1, jnp.int8), 40, WideQuantizedConfig(2, 256, 2, 3, 2, 2, cluster=2), False),
    (eight_bit(128, 256, 1, FLOAT8), 24, WideQuantizedConfig(2, 32, 1, 3, 2, 1), True),
    (with_zeros(eight_bit(128, 256, 8, jnp.int8)), 24, WideQuantizedConfig(2, 32, 1, 3, 2, 1), True),
    (eight_bit(192, 512, 2, FLOAT8), 24, WideQuantizedConfig(3, 32, 1, 3, 2, 1), False),
]
WIDE_NAMES = ["groups-of-32", "token-tiles", "gated", "minima", "nf4", "int8", "gated-float8", "zeros", "groups-of-256"]


@pytest.mark.parametrize(("weight", "num_tokens", "config", "gated"), WIDE_CUTS, ids=WIDE_NAMES)
def test_the_wide_kernel_multiplies(weight, num_tokens, config, gated):
    x = activations(num_tokens, weight.shape[1])
    parts = quantized_matmul_wide(x, weight, config=config, gated=gated, interpret=True)
    assert parts.shape == (1 if config.splits == 1 else 4, num_tokens, weight.shape[0] // (2 if gated else 1))
    out = parts.astype(F32).sum(axis=0)
    if gated:
        expected = multiply_gated(quantized_matmul_reference(x, weight, F32))
        assert float(jnp.linalg.norm(out - expected) / jnp.linalg.norm(expected)) < 2 * HALF_OF_THE_LAST_BIT[BF16]
    else:
        assert error(out, x, weight) < HALF_OF_THE_LAST_BIT[BF16]


def test_a_widened_weight_is_the_dequantized_one():
    for weight in (four_bit(40, 256, 32, zeros=True, minima=True), four_bit(40, 256, 64, values=NF4)):
        np.testing.assert_array_equal(dequantize_triton(weight, F32, interpret=True), weight.dequantize(F32))


@pytest.mark.parametrize(("dtype", "bound"), [(FLOAT8, 0.04), (jnp.int8, 0.01)])
def test_eight_bit_products(dtype, bound):
    x, weight = activations(32, 256) * jnp.arange(1, 33, dtype=BF16)[:, None], eight_bit(64, 256, 1, dtype)
    rounded = round_activations(x, dtype, 256, None)
    assert error(eight_bit_matmul(*rounded, weight, BF16), x, weight) < bound  # scales are the tokens' own: 1 to 32 times as large
    by_kernel = round_rows(x[:, :200], dtype, interpret=True)
    for found, expected in zip(by_kernel, round_activations(x[:, :200], dtype, 200, None), strict=True):
        np.testing.assert_array_equal(found.astype(F32), expected.astype(F32))
    codes, scales = round_activations(x, dtype, 256, jnp.float32(0.25))
    assert float(jnp.abs((codes.astype(F32) * scales - x.astype(F32))[0]).max()) < 0.25


def abstract(weight, size, depth):
    """The weight's structure at another shape."""

    def scaled(leaf):
        rows = {weight.shape[0]: size, weight.shape[1]: depth, weight.shape[1] // 128: depth // 128}
        if (groups := len(weight.scales)) > 1:
            rows[groups] = groups * depth // weight.shape[1]
        return jax.ShapeDtypeStruct(tuple(rows.get(length, length) for length in leaf.shape), leaf.dtype)

    return jax.tree.map(scaled, weight)


def lowered(monkeypatch, gpu, num_tokens, weight, out_dtype=BF16, dtype=BF16, product=None) -> str:
    monkeypatch.setattr(api, "local_gpu", lambda: gpu)
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=gpu.num_multiprocessors, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), abstract_device=device)
    x = jax.ShapeDtypeStruct((num_tokens, weight.shape[1]), dtype)
    with jax.sharding.use_abstract_mesh(mesh), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Pallas-Triton is deprecated
        spec = PartitionSpec()
        product = product or functools.partial(quantized_matmul, out_dtype=out_dtype)
        call = jax.shard_map(product, in_specs=(spec, spec), out_specs=spec, check_vma=False)
        return jax.jit(call).trace(x, weight).lower(lowering_platforms=("cuda",)).as_text()


HOPPER, AMPERE = Gpu(132, True), Gpu(108, False)
TRITON = "custom_call @__gpu$xla.gpu.triton"


def test_what_is_lowered_for_gpus(monkeypatch):
    codes = abstract(four_bit(64, 256, 128, zeros=True, minima=True), 28672, 4096)
    for gpu, num_tokens in ((HOPPER, 1), (AMPERE, 64), (AMPERE, 2048)):
        assert lowered(monkeypatch, gpu, num_tokens, codes, F32 if num_tokens == 1 else BF16).count(TRITON) == 1
    # An array of one value would be a kernel that fills it.
    plain = lowered(monkeypatch, HOPPER, 8, abstract(four_bit(64, 256, 128), 6144, 4096))
    assert plain.count(TRITON) == 1 and "dense<8>" not in plain and "stablehlo.broadcast" not in plain
    floats = abstract(eight_bit(64, 256, 1, FLOAT8, quantized_activations=True), 6144, 4096)
    # Few tokens of float8: one kernel, parts of its own, and SwiGLU within; nothing else is launched.
    tall = abstract(floats, 28672, 4096)
    for product, num_tokens, weight in (
        (quantized_matmul_parts, 8, floats),
        (quantized_matmul_parts, 64, floats),
        (quantized_gated_matmul, 8, tall),
    ):
        text = lowered(monkeypatch, HOPPER, num_tokens, weight, product=product)
        assert text.count("custom_call @mosaic_gpu_v2") == 1 and TRITON not in text and "stablehlo.reduce" not in text
    assert "(tensor<64x4096xf8E4M3FN>, tensor<28672x4096xf8E4M3FN>)" in lowered(
        monkeypatch, HOPPER, 64, tall, product=quantized_gated_matmul
    )
    assert TRITON in lowered(monkeypatch, AMPERE, 16, floats)
    assert TRITON in lowered(monkeypatch, AMPERE, 16, eight_bit(72, 25, 1, FLOAT8))  # columns that no power of two cuts
    # Weights stay as they lie, [N, K]: cuBLASLt reads them so.
    text = lowered(monkeypatch, HOPPER, 2048, floats)
    assert "stablehlo.transpose" not in text and "contracting_dims = [1] x [1]" in text
    assert "(tensor<2048x4096xf8E4M3FN>, tensor<6144x4096xf8E4M3FN>)" in text
    # What a kernel of ours has written another one rounds; a gated product scales its sums itself.
    assert TRITON in lowered(monkeypatch, HOPPER, 2048, floats, product=quantized_matmul_parts)
    gated = lowered(monkeypatch, HOPPER, 2048, abstract(floats, 28672, 4096), product=quantized_gated_matmul)
    assert gated.count("custom_call @mosaic_gpu_v2") == 1 and "dot_general" not in gated
    # Some and many tokens and 4 bits: one kernel, no weight of 16 bits.
    four = abstract(four_bit(64, 256, 128), 28672, 4096)
    for product, num_tokens in ((quantized_gated_matmul, 8), (quantized_gated_matmul, 2048), (quantized_matmul_parts, 2048)):
        text = lowered(monkeypatch, HOPPER, num_tokens, four, product=product)
        assert text.count("custom_call @mosaic_gpu_v2") == 1 and TRITON not in text and "28672x4096x" not in text
    # And 8 bits, where activations are not rounded, with zeros or without.
    for groups, dtype in ((1, jnp.int8), (2, FLOAT8)):
        eight = abstract(eight_bit(64, 256, groups, dtype, quantized_activations=groups > 1), 28672, 4096)
        for product in (quantized_gated_matmul, quantized_matmul_parts):
            text = lowered(monkeypatch, HOPPER, 160, eight, product=product)
            assert text.count("custom_call @mosaic_gpu_v2") == 1 and TRITON not in text and "28672x4096xbf16" not in text
    text = lowered(monkeypatch, HOPPER, 2048, abstract(with_zeros(eight_bit(64, 256, 2, jnp.int8)), 28672, 4096))
    assert text.count("custom_call @mosaic_gpu_v2") == 1 and "28672x4096x" not in text.replace("28672x4096xi8", "")
    # One token is one kernel, too: nothing pads it before, nothing cuts the result.
    for weight in (four, floats):
        text = lowered(monkeypatch, HOPPER, 1, weight, product=quantized_matmul_parts)
        assert text.count("custom_call @mosaic_gpu_v2") == 1 and "<8x4096x" not in text and f"x8x{weight.shape[0]}x" not in text
    # No float8 products before sm_89: the weight is widened.
    assert "tensor<2048x4096xf8E4M3FN>" not in lowered(monkeypatch, AMPERE, 2048, floats)
    integers = abstract(eight_bit(64, 256, 1, jnp.int8, quantized_activations=True), 6144, 4096)
    for gpu, product in ((HOPPER, None), (AMPERE, quantized_matmul_parts)):
        text = lowered(monkeypatch, gpu, 2048, integers, product=product)
        assert "stablehlo.transpose" not in text and "contracting_dims = [1] x [1]" in text
        assert "(tensor<2048x4096xi8>, tensor<6144x4096xi8>)" in text and (TRITON in text) == (product is not None)


@pytest.mark.parametrize(("group", "zeros"), [(32, False), (64, True), (128, True)])
def test_zeros_and_small_groups_lower_for_a_hopper_gpu(monkeypatch, group, zeros):
    """Their bytes are few for a copy to SMEM, and an odd number of warpgroups' may be too few."""
    weight = four_bit(64, 256, group, zeros=zeros)
    for num_tokens in (64, 2048):
        tall, odd = (abstract(weight, size, 4096) for size in (28672, 960))
        text = lowered(monkeypatch, HOPPER, num_tokens, tall, product=quantized_gated_matmul)
        assert text.count("custom_call @mosaic_gpu_v2") == 1 and TRITON not in text
        text = lowered(monkeypatch, HOPPER, num_tokens, odd, product=quantized_matmul_parts)
        assert text.count("custom_call @mosaic_gpu_v2") == (group < 128) and (TRITON in text) == (group == 128)
    few = lowered(monkeypatch, HOPPER, 16, abstract(weight, 28672, 4096), product=quantized_gated_matmul)
    assert few.count("custom_call @mosaic_gpu_v2") == 1 and TRITON not in few


@pytest.mark.parametrize("options", [dict(group=64, values=NF4), dict(group=32, minima=True, values=COUNTED)], ids=["nf4", "minima"])
def test_many_tokens_meet_no_widened_weight_on_a_hopper_gpu(monkeypatch, options):
    weight = abstract(four_bit(64, 256, **options), 28672, 4096)
    for product, dtype in ((quantized_gated_matmul, F16), (quantized_matmul_parts, BF16)):
        text = lowered(monkeypatch, HOPPER, 2048, weight, dtype=dtype, product=product)
        assert text.count("custom_call @mosaic_gpu_v2") == 1 and TRITON not in text and "dot_general" not in text
    for num_tokens in (32, 33, 128, 129, 256, 8192):
        for gated in (False, True):
            x = jax.ShapeDtypeStruct((num_tokens, 4096), BF16)
            cut = widening_config(x, weight, BF16, HOPPER, gated)  # pyright: ignore[reportArgumentType]
            assert (cut is None) == (num_tokens < (129 if weight.minima is not None else 33))
            if cut is not None:
                lanes, of_group = wide_token_tiles(num_tokens, cut.tokens)[0], 2 if weight.minima is None else 2 + 4
                codes = 64 * cut.warpgroups * (64 + 128 // options["group"] * of_group)
                stored = 128 * 64 * max(2 * cut.warpgroups, -(-lanes // 64))
                assert lanes * 128 * cut.num_stages + codes * cut.code_stages + stored < 227 * 1024 and cut.num_stages > 2


def test_widened_weights_are_multiplied_by_the_kernels_of_16_bits(monkeypatch):
    """SwiGLU is within the product, and what is added to the stream is added there."""

    def weight(size, depth):  # Q6_K's
        scales = jax.ShapeDtypeStruct((size, depth // 16), F32)
        return PlainWeight(jax.ShapeDtypeStruct((size, depth), jnp.int8), scales, None, None, Layout("int8", 16))  # pyright: ignore

    def add(x, weight):
        return quantized_add_matmul(x, weight, jnp.zeros((2048, 4096), F32))

    for product, size in ((quantized_gated_matmul, 28672), (add, 4096)):
        text = lowered(monkeypatch, HOPPER, 2048, weight(size, 4096), product=product)
        assert text.count("custom_call @mosaic_gpu_v2") == 1 and "dot_general" not in text and f"tensor<{size}x4096xbf16>" in text
    assert "dot_general" in lowered(monkeypatch, AMPERE, 2048, weight(28672, 4096))


@pytest.mark.parametrize(("group", "zeros"), [(128, False), (64, True), (32, True)])
@pytest.mark.parametrize(("size", "depth"), [(28672, 4096), (128256, 4096), (28672, 640), (151936, 768), (6144, 4096)])
def test_the_cut_of_few_tokens_and_four_bits_fits(size, depth, group, zeros):
    weight = abstract(four_bit(64, 256, group, zeros=zeros), size, depth)
    groups, bytes_of_group = 128 // group, weight.scales.dtype.itemsize + zeros  # pyright: ignore[reportAttributeAccessIssue]
    for num_tokens in (1, 8, 9, 16, 17):
        x = jax.ShapeDtypeStruct((num_tokens, depth), BF16)
        for gated in (False, True):
            cut = four_bit_config(x, weight, BF16, HOPPER, gated)  # pyright: ignore[reportArgumentType]
            assert (cut is not None) == (num_tokens <= 16 and size >= 28672)
            if cut is None:
                continue
            if (size, depth) == (28672, 4096):  # as measured
                assert (cut.shares, cut.width, cut.num_stages) == (2 if num_tokens <= 8 else 1, 2, 4)
            lanes, rows = -(-num_tokens // 8) * 8, 64 * cut.teams * cut.heights
            in_flight = cut.num_stages * cut.width * (rows * (64 + groups * bytes_of_group) + lanes * (256 + 4 * groups))
            assert in_flight + rows * lanes * (2 + 4 * (cut.shares - 1)) < 227 * 1024 and cut.num_stages >= 2 * cut.shares
            assert size % rows == 0 and depth % (128 * cut.width * cut.shares) == 0 and cut.num_stages % cut.shares == 0


@pytest.mark.parametrize(("size", "depth"), [(28672, 4096), (4096, 14336), (6144, 4096), (128256, 4096), (1000, 512), (24, 128)])
def test_the_cut_fits(size, depth):
    for weight in (abstract(four_bit(64, 256, 128), size, depth), abstract(eight_bit(64, 256, 1, FLOAT8), size, depth)):
        for num_tokens in (1, 16, 33, 64, 130, 256):
            x = jax.ShapeDtypeStruct((num_tokens, depth), BF16)
            config = triton_config(x, weight, HOPPER)  # pyright: ignore[reportArgumentType]
            assert config is not None and config.splits * 4 <= max(4, depth // 128) and config.num_warps * 16 <= max(16, config.tile)
            assert config.tile * config.tokens <= 256 * 64  # float32 sums in registers
            mosaic_config(x, weight, BF16, HOPPER)  # pyright: ignore[reportArgumentType]
            for gated in (False, True):
                cut = eight_bit_config(x, weight, BF16, HOPPER, gated)  # pyright: ignore[reportArgumentType]
                takes = isinstance(weight, EightBitWeight) and size % 64 == 0 and (not gated or (num_tokens <= 64 and size >= 28672))
                assert (cut is not None) == takes
                if cut is not None:
                    lanes, heights = token_tiles(num_tokens)[0], cut.warpgroups * (1 + gated)
                    in_flight = cut.columns * (64 * heights + 2 * lanes) * cut.num_stages
                    assert in_flight + cut.warpgroups * min(2, cut.splits) * lanes * 128 < 227 * 1024 and cut.num_stages > 2
                    assert size % (64 * heights) == 0 and depth % (cut.splits * cut.columns) == 0
        many = jax.ShapeDtypeStruct((257, depth), BF16)
        code_bytes = 64 if isinstance(weight, FourBitWeight) else 128
        for num_tokens, gated in ((129, False), (160, True), (256, False), (512, False), (2048, True)):
            x = jax.ShapeDtypeStruct((num_tokens, depth), BF16)
            wide = widening_config(x, weight, BF16, HOPPER, gated)  # pyright: ignore[reportArgumentType]
            assert (wide is not None) == (size % 128 == 0)
            if wide is not None:
                lanes, _ = wide_token_tiles(num_tokens, wide.tokens)
                in_flight = lanes * 128 * wide.num_stages + 64 * wide.warpgroups * code_bytes * wide.code_stages
                assert in_flight + 4 * 64 * 32 * max(2 * wide.warpgroups, lanes // 64) < 227 * 1024 and wide.num_stages > 2
        assert triton_config(many, weight, HOPPER) is None  # pyright: ignore[reportArgumentType]
