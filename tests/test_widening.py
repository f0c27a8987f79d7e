"""The PTX that widens codes of 4 bits for the wide kernel, in an emulator: every code in every place, against `dequantize`."""

import jax.numpy as jnp
import numpy as np
import pytest
from ptx_arithmetic import run

from jaxserve.pallas_kernels.quantized_matmul import TABLES, pack_four_bit
from jaxserve.pallas_kernels.quantized_matmul.upcast import (
    addend_pair_asm,
    look_up_asm,
    products_asm,
    raised_four_bit_asm,
    scale_pair_asm,
    scaled_asm,
    scaled_four_bit_asm,
)
from jaxserve.pallas_kernels.quantized_matmul.weights import FourBitWeight
from jaxserve.pallas_kernels.quantized_matmul.widening import Meaning

COUNTED = tuple(map(float, range(16)))
KINDS = {name: tuple(table.tolist()) for name, table in TABLES.items()} | {"zeros": None, "minima": COUNTED, "minima-8": None}


def four_bit(kind: str, scale_dtype: str) -> FourBitWeight:
    """64 rows of random codes, scales, zeros and minima: of two words that lie together both codes of a plane take all 256 values."""
    random = np.random.default_rng(len(kind))
    scales = random.uniform(0.1, 1.5, (64, 1)).astype(np.float32)
    minima = random.standard_normal((64, 1)).astype(np.float32) if kind.startswith("minima") else None
    zeros = random.integers(0, 16, (64, 1)) if kind == "zeros" else None
    return pack_four_bit(random.integers(0, 16, (64, 128)), scales.astype(jnp.dtype(scale_dtype)), zeros, minima, values=KINDS[kind])


def twice(x: np.ndarray) -> np.ndarray:
    """One a row [64, 1] for each pair of words of a row, [64 * 16]."""
    return np.broadcast_to(x.reshape(64, 1), (64, 16)).reshape(-1)


def widened(weight: FourBitWeight, meaning: Meaning) -> np.ndarray:
    """The matrix [64, 128] that the kernel's instructions make; pairs of a row are neighbouring threads."""
    pairs = np.ascontiguousarray(weight.codes[0]).view(np.uint32).reshape(-1)
    scale, dtype = twice(np.asarray(weight.scales, np.float32)), meaning.dtype
    factors = run(scale_pair_asm(dtype), [scale], 2)[: 1 if meaning.exact else 2]
    planes: list[np.ndarray] = []
    for half in range(2):
        if meaning.table is not None and meaning.has_products:
            parts = np.asarray(meaning.kept(), np.float32).reshape(-1, 4)
            own = [parts[np.arange(len(pairs)) % len(parts), i] for i in range(4)]
            tables = run(products_asm(len(parts), dtype), [scale, *own], 2 * len(parts))
            names = [f"${3 + i}" for i in range(2 * len(parts))]
            planes += run(look_up_asm(half, names[: len(parts)], names[len(parts) :]), [pairs, *tables], 2)
        elif meaning.table is not None:
            looked_up = run(look_up_asm(half, *meaning.bytes_of_table()), [pairs], 2)
            planes += [run(scaled_asm(dtype, meaning.exact), [x, *factors])[0] for x in looked_up]
        else:
            for plane in (2 * half, 2 * half + 1):
                if weight.minima is not None:
                    operands = [scale * np.float32(16.0**-plane), twice(np.asarray(weight.minima))]
                    code = raised_four_bit_asm(plane, dtype, meaning.zero)
                else:
                    assert weight.zeros is not None
                    operands = [*run(addend_pair_asm(dtype), [twice(np.asarray(weight.zeros, np.uint32))]), *factors]
                    code = scaled_four_bit_asm(plane, dtype, meaning.exact)
                planes += run(code, [pairs, *operands])
    numbers = [np.ascontiguousarray(plane).view(jnp.dtype(dtype)).reshape(64, 32) for plane in planes]
    return np.concatenate(numbers, axis=1)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("scale_dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_widened_codes_are_the_dequantized_ones(kind, scale_dtype, dtype):
    weight, dtype = four_bit(kind, scale_dtype), jnp.dtype(dtype)
    meaning = Meaning.of(weight, dtype)
    assert meaning.has_products == (kind in ("nf4", "fp4"))
    found, expected = widened(weight, meaning).astype(np.float32), np.asarray(weight.dequantize(dtype), np.float32)
    if kind.startswith("minima"):  # in one instruction, where dequantize may round the product to float32 first
        counted = FourBitWeight(weight.codes, jnp.ones((1, 64)), values=COUNTED).dequantize(jnp.float32)
        codes, scales, minima = (np.asarray(x, np.float64) for x in (counted, weight.scales, weight.minima))
        expected = ((codes - meaning.zero) * scales.T + minima.T).astype(np.float32).astype(dtype).astype(np.float32)
    if scale_dtype == "float32" and kind in ("zeros", "e2m1"):  # two of dtype hold almost all of a scale
        exact = np.asarray(weight.dequantize(jnp.float32))
        np.testing.assert_allclose(found, exact, rtol=0.51 * float(jnp.finfo(dtype).eps))
    else:
        np.testing.assert_array_equal(found, expected)
