"""Codes to 16-bit numbers in registers, in the very places where wgmma wants its left operand, for mosaic_wide.py."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.mosaic.gpu.utils import bitcast
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from jaxserve.pallas_kernels.mosaic import BY_ROW, HEIGHT
from jaxserve.pallas_kernels.quantized_matmul.upcast import (
    addend_pair_asm,
    byte_planes,
    look_up_asm,
    products_asm,
    raised_four_bit_asm,
    scale_pair_asm,
    scaled_asm,
    scaled_four_bit_asm,
)
from jaxserve.pallas_kernels.quantized_matmul.weights import BLOCK, FourBitWeight


@dataclass(frozen=True)
class Meaning:
    """What codes of 4 bits stand for, as numbers of a dtype: each is rounded once, as `FourBitWeight.dequantize` rounds it.

    Attributes:
        dtype: bfloat16 or float16.
        exact: it holds the scales.
        table: the 16 values; None: (code - zero) * scale.
        has_minima: an element is (code - zero) * scale + minimum.
        zero: of all codes, where the weight has no zeros of its own.
    """

    dtype: jnp.dtype
    exact: bool
    table: tuple[float, ...] | None = None
    has_minima: bool = False
    zero: int = 8

    @classmethod
    def of(cls, weight: FourBitWeight, dtype: jnp.dtype) -> "Meaning":
        """Of a weight's codes; one that has minima has neither zeros nor a table."""
        counted = weight.values == tuple(range(16))
        table = None if counted else weight.values
        return cls(dtype, weight.scales.dtype == dtype, table, weight.minima is not None, 0 if counted else 8)

    @property
    def has_products(self) -> bool:
        """Whether values are multiplied by scales before they are looked up, as dtype does not hold the values themselves."""
        return self.table is not None and self._entries().astype(np.float32).tolist() != list(self.table)

    @property
    def is_mirrored(self) -> bool:
        """Whether codes from 8 on stand for what those below do with another sign."""
        return self.table is not None and [-x for x in self.table[:8]] == list(self.table[8:])

    def kept(self) -> tuple[float, ...]:
        """The values that are looked up."""
        assert self.table is not None
        return self.table[:8] if self.is_mirrored else self.table

    def bytes_of_table(self) -> tuple[list[str], list[str]]:
        """For `look_up_asm`."""
        lower, upper = byte_planes(self._entries()[: len(self.kept())])
        lower = lower[:1] if set(lower) <= {0} else lower
        return [f"0x{x:08x}" for x in lower], [f"0x{x:08x}" for x in upper]

    def _entries(self) -> np.ndarray:
        return np.asarray(self.table, np.float32).astype(jnp.bfloat16 if self.dtype == jnp.bfloat16 else np.float16)


def scaled_numbers(
    codes: jax.Array, half: int, scales: list[jax.Array], corrections: list[jax.Array], meaning: Meaning, interpret: bool
) -> jax.Array:
    """Numbers [64, 64] of half of a block's codes, uint16 [64, 32].

    Args:
        half: 0 or 1.
        scales: float32 [64], of each of the block's groups.
        corrections: likewise minima, float32, or zeros, int32.
        meaning: of the codes.
        interpret: on a CPU.
    """
    planes = 2 * half, 2 * half + 1
    groups = [plane * len(scales) // 4 for plane in planes]
    if interpret:
        return jnp.concatenate(
            [_plain_numbers(codes, plane, scales[g], corrections[g], meaning) for plane, g in zip(planes, groups, strict=True)], axis=1
        )

    # The second axis of the registers are tiles of 8 columns, the fifth the upper and the lower 8 rows.
    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA, *[BY_ROW] * 4),
        return_type=plgpu.ShapeDtypeStruct((HEIGHT, BLOCK // 2), meaning.dtype, layout=plgpu.Layout.WGMMA),
    )
    def widen(ctx, codes, *of_rows):
        del ctx
        pair = ir.VectorType.get((2,), ir.BF16Type.get() if meaning.dtype == jnp.bfloat16 else ir.F16Type.get())
        tiles = codes.registers.shape[1]
        registers = np.empty((codes.registers.shape[0], 2 * tiles, *codes.registers.shape[2:]), dtype=object)
        operands = [[bitcast(x, _word()) for x in of_row] for of_row in zip(*(array.registers.flat for array in of_rows), strict=True)]
        rows = [_widening(of_row[:2], of_row[2:], half, groups[0] == groups[1], meaning) for of_row in operands]
        for place, register in np.ndenumerate(codes.registers):
            for n, numbers in enumerate(rows[place[4]](bitcast(register, _word()))):
                registers[(place[0], n * tiles + place[1], *place[2:])] = bitcast(numbers, pair)
        return mgpu.FragmentedArray(_registers=registers, _layout=mgpu.WGMMA_LAYOUT, _is_signed=None)

    # The decorator takes the first argument, a context, away.
    operands = *(scales[g] for g in groups), *(corrections[g] for g in groups)
    return widen(codes, *operands)  # pyright: ignore[reportReturnType]


def _plain_numbers(codes: jax.Array, plane: int, scales: jax.Array, corrections: jax.Array, meaning: Meaning) -> jax.Array:
    codes = (codes >> jnp.uint16(4 * plane)) & jnp.uint16(15)
    scales, corrections = (lax.broadcast_in_dim(x, codes.shape, (0,)) for x in (scales, corrections))
    if meaning.table is not None:
        numbers = jnp.zeros(codes.shape, jnp.float32)
        for code, value in enumerate(meaning.table):
            numbers = jnp.where(codes == code, value, numbers)
    else:
        numbers = (codes.astype(jnp.int32) - (meaning.zero if meaning.has_minima else corrections)).astype(jnp.float32)
    return (numbers * scales + (corrections if meaning.has_minima else 0.0)).astype(meaning.dtype)


def _widening(scales: list, corrections: list, half: int, same_group: bool, meaning: Meaning) -> Callable[[ir.Value], list]:
    """The function of two words of codes of a row to its numbers in each plane; scales and corrections are the planes', in registers."""
    dtype, planes = meaning.dtype, (2 * half, 2 * half + 1)
    floats = [bitcast(scale, ir.F32Type.get()) for scale in scales]
    if meaning.has_products:
        tables = _products(floats[: 1 if same_group else 2], meaning)
        size = len(tables[0]) // 2
        code = look_up_asm(half, [f"${3 + i}" for i in range(size)], [f"${3 + size + i}" for i in range(size)])
        if same_group:
            return lambda words: _asm(code, 2, words, *tables[0])
        return lambda words: [_asm(code, 2, words, *table)[n] for n, table in enumerate(tables)]
    if meaning.has_minima:
        factors = [arith.mulf(scale, mgpu_utils.c(16.0**-plane, scale.type)) for plane, scale in zip(planes, floats, strict=True)]
        minima = [bitcast(x, ir.F32Type.get()) for x in corrections]
        codes = [raised_four_bit_asm(plane, dtype, meaning.zero) for plane in planes]
        return lambda words: [_asm(codes[n], 1, words, factors[n], minima[n])[0] for n in range(2)]
    # A scale is two in dtype, where that does not hold it.
    factors = [_asm(scale_pair_asm(dtype), 2, scale)[: 1 if meaning.exact else 2] for scale in floats]
    if meaning.table is not None:
        looked_up, scaled = look_up_asm(half, *meaning.bytes_of_table()), scaled_asm(dtype, meaning.exact)
        return lambda words: [
            _asm(scaled, 1, numbers, *of_plane)[0] for numbers, of_plane in zip(_asm(looked_up, 2, words), factors, strict=True)
        ]
    added = [_asm(addend_pair_asm(dtype), 1, zero) for zero in corrections]
    codes = [scaled_four_bit_asm(plane, dtype, meaning.exact) for plane in planes]
    return lambda words: [_asm(codes[n], 1, words, *added[n], *factors[n])[0] for n in range(2)]


def _products(scales: list, meaning: Meaning) -> list[list]:
    """The table times each scale, registers for `look_up_asm`: lower bytes, then upper ones."""
    kept, single, word = meaning.kept(), ir.F32Type.get(), _word()
    num_parts = len(kept) // 4
    part = arith.andi(mgpu_utils.thread_idx(), mgpu_utils.c(num_parts - 1, word))
    own = [mgpu_utils.c(x, single) for x in kept[:4]]
    for n in range(1, num_parts):
        is_own = arith.cmpi(arith.CmpIPredicate.eq, part, mgpu_utils.c(n, word))
        own = [arith.select(is_own, mgpu_utils.c(x, single), other) for x, other in zip(kept[4 * n : 4 * n + 4], own, strict=True)]
    return [_asm(products_asm(num_parts, meaning.dtype), 2 * num_parts, scale, *own) for scale in scales]


def _asm(code: str, num_results: int, *operands: ir.Value) -> list:
    """The words that PTX gives for words and float32."""
    letters = ["f" if operand.type == ir.F32Type.get() else "r" for operand in operands]
    constraints = ",".join(["=r"] * num_results + letters)
    if num_results == 1:
        return [llvm.inline_asm(_word(), [*operands], code, constraints)]
    words = llvm.inline_asm(llvm.StructType.get_literal([_word()] * num_results), [*operands], code, constraints)
    return [llvm.extractvalue(_word(), words, [i]) for i in range(num_results)]


def _word():
    return ir.IntegerType.get_signless(32)
