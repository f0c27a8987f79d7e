"""Codes to 16-bit numbers in registers, in the very places where wgmma wants its left operand, for mosaic_wide.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu.utils import bitcast
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from jaxserve.pallas_kernels.mosaic import BY_ROW, HEIGHT
from jaxserve.pallas_kernels.quantized_matmul.upcast import addend_pair_asm, scale_pair_asm, scaled_four_bit_asm
from jaxserve.pallas_kernels.quantized_matmul.weights import BLOCK


def scaled_numbers(codes, half: int, zeros: list[jax.Array], scales: list[jax.Array], dtype, exact: bool, interpret: bool) -> jax.Array:
    """Numbers [64, 64] in dtype of half of a block's codes, uint16 [64, 32], less zeros, int32 [64], times scales, float32 [64].

    `exact`: dtype holds the scales. Zeros and scales are of each of the block's groups.
    """
    planes = 2 * half, 2 * half + 1
    groups = [plane * len(scales) // 4 for plane in planes]
    if interpret:
        columns = []
        for plane, group in zip(planes, groups, strict=True):
            numbers = ((codes >> jnp.uint16(4 * plane)) & jnp.uint16(15)).astype(jnp.int32)
            numbers = numbers - lax.broadcast_in_dim(zeros[group], numbers.shape, (0,))
            columns.append(numbers.astype(jnp.float32) * lax.broadcast_in_dim(scales[group], numbers.shape, (0,)))
        return jnp.concatenate(columns, axis=1).astype(dtype)
    word = functools.partial(ir.IntegerType.get_signless, 32)

    # The second axis of the registers are tiles of 8 columns, the fifth the upper and the lower 8 rows.
    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA, *[BY_ROW] * 4),
        return_type=plgpu.ShapeDtypeStruct((HEIGHT, BLOCK // 2), dtype, layout=plgpu.Layout.WGMMA),
    )
    def widen(ctx, codes, *of_rows):
        del ctx
        pair = ir.VectorType.get((2,), ir.BF16Type.get() if dtype == jnp.bfloat16 else ir.F16Type.get())
        both = llvm.StructType.get_literal([word(), word()])
        tiles = codes.registers.shape[1]
        registers = np.empty((codes.registers.shape[0], 2 * tiles, *codes.registers.shape[2:]), dtype=object)
        for n, plane in enumerate(planes):
            zeros, scales = of_rows[n].registers.flat, of_rows[2 + n].registers.flat
            added = [llvm.inline_asm(word(), [bitcast(zero, word())], addend_pair_asm(dtype), "=r,r") for zero in zeros]
            floats = [bitcast(bitcast(scale, word()), ir.F32Type.get()) for scale in scales]
            split = [llvm.inline_asm(both, [scale], scale_pair_asm(dtype), "=r,=r,f") for scale in floats]
            factors = [[llvm.extractvalue(word(), x, [i]) for i in range(1 if exact else 2)] for x in split]
            asm = scaled_four_bit_asm(plane, dtype, exact)
            for place, register in np.ndenumerate(codes.registers):
                operands = [bitcast(register, word()), added[place[4]], *factors[place[4]]]
                number = llvm.inline_asm(word(), operands, asm, "=r" + ",r" * len(operands))
                registers[(place[0], n * tiles + place[1], *place[2:])] = bitcast(number, pair)
        return mgpu.FragmentedArray(_registers=registers, _layout=mgpu.WGMMA_LAYOUT, _is_signed=None)

    # The decorator takes the first argument, a context, away.
    operands = *(zeros[g] for g in groups), *(scales[g] for g in groups)
    return widen(codes, *operands)  # pyright: ignore[reportReturnType]
