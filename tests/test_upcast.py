"""The PTX that widens codes, on all of them."""

import jax.numpy as jnp
import numpy as np
import pytest
from ptx_arithmetic import run

from jaxserve.pallas_kernels.quantized_matmul.upcast import UPPER_BASE, eight_bit_pair_asm, scaled_eight_bit_asm

F32, FLOAT8, INT8 = np.float32, np.dtype(jnp.float8_e4m3fn), np.dtype(np.int8)
BF16, F16 = np.dtype(jnp.bfloat16), np.dtype(np.float16)
ALL = np.arange(256, dtype=np.uint8)
PAIRS = ALL | ALL[::-1].astype(np.uint32) << np.uint32(8)  # each code in the lower and in the upper byte


def halves(word: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Float32 [2, 256], of the lower and of the upper bytes."""
    return np.stack([(word >> np.uint32(16 * i)).astype(np.uint16).view(dtype).astype(F32) for i in range(2)])


def codes_of(dtype: np.dtype) -> np.ndarray:
    return np.stack([ALL, ALL[::-1]]).view(dtype).astype(F32)


def words(x) -> np.ndarray:
    return np.asarray(x, F32).view(np.uint32)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("codes_dtype", [INT8, FLOAT8], ids=str)
def test_pairs_of_eight_bits_are_widened_exactly(codes_dtype, dtype):
    [word] = run(eight_bit_pair_asm(codes_dtype, dtype), [PAIRS])
    np.testing.assert_array_equal(halves(word, dtype), codes_of(codes_dtype))


@pytest.mark.parametrize("scale", [0.0123, 3.1e-4, 1.0, 0.9995], ids=str)
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_pairs_of_eight_bits_are_scaled_as_they_are_dequantized(dtype, scale):
    for codes_dtype, scale_dtype in ((INT8, F16), (INT8, F32), (FLOAT8, F32)):
        codes = codes_of(codes_dtype)
        factor = np.asarray(scale, scale_dtype).astype(F32)
        operands = [words(factor), words(-F32(UPPER_BASE) * factor)][: 2 if codes_dtype == INT8 else 1]
        [word] = run(scaled_eight_bit_asm(codes_dtype, dtype, zeros=False), [PAIRS, *operands])
        found, expected = halves(word, dtype), (codes * factor).astype(dtype).astype(F32)
        np.testing.assert_array_equal(found[0], expected[0])
        if codes_dtype == FLOAT8 or scale_dtype == F16:
            np.testing.assert_array_equal(found[1], expected[1])
        else:
            assert (np.abs(found - codes * factor) <= np.abs(expected - codes * factor) + factor / 256).all()
        for zero in (-128, -3, 128):
            upper = [words(-F32(zero + UPPER_BASE) * factor)] if codes_dtype == INT8 else []
            operands = [words(factor), *upper, words(-factor * F32(zero))]
            [word] = run(scaled_eight_bit_asm(codes_dtype, dtype, zeros=True), [PAIRS, *operands])
            wanted = (codes - zero) * factor
            found, expected = halves(word, dtype), wanted.astype(dtype).astype(F32)
            exact = np.s_[0] if scale_dtype == F16 else np.s_[:0]
            np.testing.assert_array_equal(found[exact], expected[exact])
            # A rounded offset can be what tips a number to its other neighbour, too.
            off = np.abs(found - wanted) - np.abs(expected - wanted)
            assert (off[~np.isnan(off)] <= factor / 256).all()
