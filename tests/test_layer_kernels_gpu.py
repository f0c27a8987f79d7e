"""The decoder layer's small GPU kernels without a GPU: interpreted against their references, and lowered for CUDA at serving shapes."""

import functools
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh
from projections import make_qkv, normal

from jaxserve.pallas_kernels import add_rms_norm
from jaxserve.pallas_kernels.add_rms_norm.reference import add_rms_norm_reference
from jaxserve.pallas_kernels.add_rms_norm.triton import AddRMSNormConfig, add_rms_norm_triton
from jaxserve.pallas_kernels.gpu import Gpu
from jaxserve.pallas_kernels.log_sum_exp.triton import log_sum_exp_triton
from jaxserve.pallas_kernels.rotate_and_write_kv.reference import rotate_and_write_kv_reference
from jaxserve.pallas_kernels.rotate_and_write_kv.triton import RotateConfig, rotate_and_write_kv_triton

BF16, F16, F32, FLOAT8, E5M2 = (jnp.dtype(name) for name in ("bfloat16", "float16", "float32", "float8_e4m3fn", "float8_e5m2"))


def assert_equal_but_for_rounding(got, expected):
    """At most one unit in the last place apart: the compiler may contract a product and a sum."""
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype
        unit = float(jnp.finfo(x.dtype).eps)
        np.testing.assert_allclose(x.astype(jnp.float32), y.astype(jnp.float32), rtol=2 * unit, atol=unit / 8)


def test_log_sum_exp_is_that_of_each_row_whatever_the_others_are():
    logits = normal(np.random.default_rng(4), (3, 5000), F32) * 5
    logits = logits.at[1, 7].set(-jnp.inf)
    call = jax.jit(functools.partial(log_sum_exp_triton, interpret=True))
    found = call(logits)
    np.testing.assert_allclose(found, np.log(np.exp(np.asarray(logits, np.float64)).sum(axis=1)), rtol=1e-6)
    assert call(logits[1:2])[0] == found[1]


@pytest.mark.parametrize(("shape", "block_rows", "dtype"), [((5, 96), 2, BF16), ((3, 2048), 1, F16), ((2, 640), 4, F32)])
def test_add_rms_norm_is_the_reference(shape, block_rows, dtype):
    random = np.random.default_rng(1)
    arguments = normal(random, shape, dtype), normal(random, shape, dtype), normal(random, shape[1:], dtype)
    call = functools.partial(add_rms_norm_triton, eps=1e-5, config=AddRMSNormConfig(block_rows, 4), interpret=True)
    assert_equal_but_for_rounding(jax.jit(call)(*arguments), jax.jit(functools.partial(add_rms_norm_reference, eps=1e-5))(*arguments))


INTERPRETED = functools.partial(add_rms_norm_triton, config=AddRMSNormConfig(2, 4), interpret=True)
IMPLEMENTATIONS = pytest.mark.parametrize("add", [add_rms_norm_reference, INTERPRETED], ids=["reference", "kernel"])


@IMPLEMENTATIONS
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_add_rms_norm_rounds_only_the_whole_sum(add, dtype):
    """Parts in bfloat16 are a float32 cut in two, as the kernel for few tokens gives them."""
    random = np.random.default_rng(1)
    residual, weight = normal(random, (5, 96)), normal(random, (96,))
    parts = normal(random, (2, 5, 96), F32)
    parts = jnp.concatenate([parts.astype(dtype), (parts - parts.astype(dtype).astype(F32)).astype(dtype)])
    normed, total = jax.jit(functools.partial(add, eps=1e-5))(parts, residual, weight)
    branch = np.zeros(residual.shape, np.float32)
    for part in np.asarray(parts.astype(F32)):
        branch = branch + part
    expected = jnp.asarray(branch + np.asarray(residual.astype(F32))).astype(BF16)
    np.testing.assert_array_equal(total, expected)
    assert (np.asarray(total) != np.asarray(jnp.asarray(branch).astype(BF16) + residual)).any()  # as it would be, rounded twice
    zero = jnp.zeros_like(residual)
    assert_equal_but_for_rounding(normed, jax.jit(functools.partial(add_rms_norm_reference, eps=1e-5))(expected, zero, weight)[0])


@IMPLEMENTATIONS
def test_add_rms_norm_rounds_once_to_another_dtype_and_never_to_infinity(add):
    random = np.random.default_rng(1)
    # Sums that bfloat16 holds: whether XLA rounds others before it normalises them is its own affair.
    x, residual = (jnp.round(normal(random, (5, 96)) * 8) / 8 for _ in range(2))
    weight = normal(random, (96,)).at[3].set(1e6)
    normed, total = jax.jit(functools.partial(add, eps=1e-5, dtype=F16))(x, residual, weight)
    wide = np.asarray((x + residual).astype(F32))
    exact = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + 1e-5) * np.asarray(weight.astype(F32))
    assert (normed.dtype, total.dtype) == (F16, BF16)
    np.testing.assert_array_equal(total, x + residual)
    np.testing.assert_allclose(normed.astype(F32), np.clip(exact, -65504, 65504), rtol=2**-10, atol=1e-6)


@IMPLEMENTATIONS
def test_add_rms_norm_of_a_float32_residual_stream(add):
    random = np.random.default_rng(1)
    parts, residual, weight = normal(random, (2, 5, 96)), normal(random, (5, 96), F32), normal(random, (96,))
    normed, total = jax.jit(functools.partial(add, eps=1e-5, dtype=F16))(parts, residual, weight)
    assert (normed.dtype, total.dtype) == (F16, F32)
    expected = np.asarray(parts[0], np.float32) + np.asarray(parts[1], np.float32) + np.asarray(residual)
    np.testing.assert_array_equal(total, expected)
    exact = expected / np.sqrt((expected**2).mean(axis=1, keepdims=True) + 1e-5) * np.asarray(weight, np.float32)
    np.testing.assert_allclose(normed.astype(F32), exact, rtol=2**-10, atol=1e-6)


@IMPLEMENTATIONS
def test_a_whole_branch_of_16_bits_does_not_round_a_float32_residual_stream(add):
    random = np.random.default_rng(1)
    x, residual, weight = normal(random, (5, 96)), normal(random, (5, 96), F32), normal(random, (96,))
    _, total = jax.jit(functools.partial(add, eps=1e-5, dtype=F16))(x, residual, weight)
    np.testing.assert_array_equal(total, np.asarray(x, np.float32) + np.asarray(residual))


@pytest.mark.parametrize(("num_tokens", "kernels"), [(64, 1), (65, 0)])
def test_xla_norms_the_many_rows_of_a_gpu(num_tokens, kernels, monkeypatch):
    monkeypatch.setattr(sys.modules["jaxserve.pallas_kernels.add_rms_norm.api"], "local_gpu", lambda: Gpu(132, is_hopper=True))
    x, weight = jax.ShapeDtypeStruct((num_tokens, 512), BF16), jax.ShapeDtypeStruct((512,), BF16)
    text = lower_for_cuda(functools.partial(add_rms_norm, eps=1e-5), x, x, weight)
    assert text.count("custom_call @__gpu$xla.gpu.triton") == kernels


ROTATE_CASES = [
    ((9, 4, 2, 32), dict(qk_norms=True), RotateConfig(1, 2, 1)),
    ((4, 3, 1, 80), dict(bias=True, qk_norms=True), RotateConfig(4, 1, 1)),
    ((6, 2, 2, 64), dict(kv_dtype=FLOAT8), RotateConfig(2, 2, 1)),
    ((9, 8, 4, 80), dict(kv_dtype=FLOAT8, scaled=True, bias=True), RotateConfig(4, 2, 1)),
    ((6, 6, 2, 64), dict(kv_dtype=E5M2, scaled=True), RotateConfig(1, 2, 1)),
]


@pytest.mark.parametrize(("sizes", "options", "config"), ROTATE_CASES, ids=["norms", "bias-odd-size", "float8", "float8-scaled", "e5m2"])
def test_rotate_and_write_kv_is_the_reference(sizes, options, config):
    arguments, options = make_qkv(*sizes, **options)
    call = functools.partial(rotate_and_write_kv_triton, eps=1e-6, dtype=BF16, config=config, interpret=True, **options)
    reference = functools.partial(rotate_and_write_kv_reference, eps=1e-6, dtype=BF16, **options)
    got, expected = jax.jit(call)(*arguments), jax.jit(reference)(*arguments)
    assert_equal_but_for_rounding(got, expected)
    written = (np.asarray(expected[1][0]) != np.asarray(arguments[2][0])).any(axis=(1, 3)).sum()
    assert written == (np.asarray(arguments[3].write_pages) < arguments[2][0].shape[0]).sum()


@pytest.mark.parametrize("qkv_dtype", [BF16, F16])
def test_rotate_and_write_kv_in_float16_beside_bfloat16(qkv_dtype):
    """Biases and norms are bfloat16's; a product that overflowed is the largest number, and so are what it is turned to."""
    (qkv, rotation, kv, metadata), options = make_qkv(9, 4, 2, 32, bias=True, qk_norms=True, kv_dtype=F16)
    qkv = qkv.astype(qkv_dtype).at[0, -3].set(jnp.inf)
    call = functools.partial(rotate_and_write_kv_triton, eps=1e-6, dtype=F16, config=RotateConfig(1, 2, 1), interpret=True, **options)
    reference = functools.partial(rotate_and_write_kv_reference, eps=1e-6, dtype=F16, **options)
    got, expected = (jax.jit(function)(qkv, rotation, kv, metadata) for function in (call, reference))
    assert_equal_but_for_rounding(got, expected)
    assert got[0].dtype == F16 and all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(got))
    page, offset = (int(x[0]) for x in (metadata.write_pages, metadata.write_offsets))
    assert got[1][1][page, -1, offset, -3] == jnp.finfo(F16).max
    plain = functools.partial(rotate_and_write_kv_reference, eps=1e-6, dtype=F32, **jax.tree.map(lambda x: x.astype(F32), options))
    wide = jax.jit(plain)(qkv.astype(F32), rotation, tuple(x.astype(F32) for x in kv), metadata)[0]
    np.testing.assert_allclose(got[0].astype(F32), wide, rtol=4e-3, atol=4e-3)


def test_rotate_and_write_kv_adds_parts_up_first():
    arguments, options = make_qkv(9, 4, 2, 32, bias=True)
    qkv, *rest = arguments
    parts = jnp.stack([normal(np.random.default_rng(i), qkv.shape, F32) for i in range(3)])
    call = functools.partial(rotate_and_write_kv_triton, eps=1e-6, dtype=BF16, interpret=True, config=RotateConfig(1, 2, 1), **options)
    got, expected = jax.jit(call)(parts, *rest), jax.jit(call)((parts[0] + parts[1] + parts[2]).astype(BF16), *rest)
    assert got[0].dtype == BF16
    assert_equal_but_for_rounding(got, expected)


def lower_for_cuda(function, *arguments, **options):
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Pallas-Triton is deprecated; nothing else serves GPUs before sm_90
        return jax.jit(function, **options).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(("num_tokens", "size"), [(1, 2048), (8192, 4096), (64, 3584), (3, 16384)])
def test_add_rms_norm_kernel_lowers_for_cuda(num_tokens, size):
    x, weight = jax.ShapeDtypeStruct((num_tokens, size), BF16), jax.ShapeDtypeStruct((size,), BF16)
    config = AddRMSNormConfig.suited(x)  # pyright: ignore[reportArgumentType]
    call = functools.partial(add_rms_norm_triton, eps=1e-5, dtype=F16 if size == 4096 else None, config=config)
    assert lower_for_cuda(call, x, x, weight).count("custom_call @__gpu$xla.gpu.triton") == 1


@pytest.mark.parametrize(("sizes", "options"), [
    ((1, 32, 8, 64), {}),
    ((256, 32, 8, 128), dict(qk_norms=True, kv_dtype=F16)),
    ((1024, 28, 4, 128), dict(bias=True)),
    ((64, 8, 1, 96), dict(kv_dtype=FLOAT8)),
    ((256, 32, 8, 128), dict(kv_dtype=FLOAT8, scaled=True)),
    ((64, 32, 8, 128), dict(kv_dtype=E5M2)),
])  # fmt: skip
def test_rotate_and_write_kv_lowers_for_cuda_in_place(sizes, options):
    arguments, options = jax.eval_shape(lambda: make_qkv(*sizes, **options))
    dtype = BF16 if arguments[2][0].dtype == BF16 else F16
    call = functools.partial(rotate_and_write_kv_triton, eps=1e-6, dtype=dtype, config=RotateConfig.suited(arguments[0], arguments[2]))
    text = lower_for_cuda(lambda arguments, options: call(*arguments, **options), arguments, options)
    assert text.count("custom_call @__gpu$xla.gpu.triton") == 1
    assert text.count("output_operand_alias<") == 2
