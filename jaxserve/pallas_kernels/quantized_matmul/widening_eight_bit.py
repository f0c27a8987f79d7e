"""Codes of 8 bits to 16-bit numbers in registers, in the very places where wgmma wants its left operand, for mosaic_wide.py."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu.utils import bitcast
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from jaxserve.pallas_kernels.mosaic import BY_ROW, HEIGHT
from jaxserve.pallas_kernels.quantized_matmul.upcast import UPPER_BASE, eight_bit_pair_asm, scaled_eight_bit_asm
from jaxserve.pallas_kernels.quantized_matmul.weights import BLOCK

_HALF = BLOCK // 2


def eight_bit_numbers(
    codes: jax.Array, half: int, scales: Sequence[jax.Array], zeros: Sequence[jax.Array] | None, dtype: jnp.dtype, interpret: bool
) -> jax.Array:
    """Numbers [64, 64] in dtype of half of a block's codes, float8_e4m3fn or int8 [64, 128], two of which are in a register.

    Less zeros, int32 [64], times scales, float32 [64], of each of the block's groups; without scales as they are.
    """
    groups = [n * len(scales) // BLOCK for n in range(half * _HALF, (half + 1) * _HALF)]  # of each column
    if interpret:
        numbers = codes[:, half * _HALF : (half + 1) * _HALF].astype(jnp.float32)
        if not scales:
            return numbers.astype(dtype)
        if zeros is not None:
            numbers -= jnp.stack([zeros[group] for group in groups], axis=1).astype(jnp.float32)
        return (numbers * jnp.stack([scales[group] for group in groups], axis=1)).astype(dtype)
    used = sorted(set(groups)) if scales else []
    of_groups = [operand for group in used for operand in _operands(codes.dtype, scales[group], None if zeros is None else zeros[group])]
    each = len(of_groups) // len(used) if used else 0
    asm = scaled_eight_bit_asm(codes.dtype, dtype, zeros is not None) if used else eight_bit_pair_asm(codes.dtype, dtype)
    word = functools.partial(ir.IntegerType.get_signless, 32)

    # The second axis of the registers are tiles of 8 columns, the fifth the upper and the lower 8 rows.
    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA, *[BY_ROW] * len(of_groups)),
        return_type=plgpu.ShapeDtypeStruct((HEIGHT, _HALF), dtype, layout=plgpu.Layout.WGMMA),
    )
    def widen(ctx, codes, *of_groups):
        del ctx
        pair = ir.VectorType.get((2,), ir.BF16Type.get() if dtype == jnp.bfloat16 else ir.F16Type.get())
        tiles = codes.registers.shape[1] // 2
        registers = np.empty((codes.registers.shape[0], tiles, *codes.registers.shape[2:]), dtype=object)
        for place in np.ndindex(registers.shape):
            both = bitcast(codes.registers[(place[0], half * tiles + place[1], *place[2:])], ir.IntegerType.get_signless(16))
            operands = [llvm.zext(word(), both)]
            if used:
                first = used.index(groups[place[1] * 8]) * each
                of_row = [array.registers.flat[place[4]] for array in of_groups[first : first + each]]
                operands += [bitcast(bitcast(x, word()), ir.F32Type.get()) for x in of_row]
            number = llvm.inline_asm(word(), operands, asm, "=r,r" + ",f" * (len(operands) - 1))
            registers[place] = bitcast(number, pair)
        return mgpu.FragmentedArray(_registers=registers, _layout=mgpu.WGMMA_LAYOUT, _is_signed=None)

    # The decorator takes the first argument, a context, away.
    return widen(codes, *of_groups)  # pyright: ignore[reportReturnType]


def _operands(codes_dtype: jnp.dtype, scales: jax.Array, zeros: jax.Array | None) -> list[jax.Array]:
    """What `scaled_eight_bit_asm` wants beside codes, float32 [64] each."""
    zeros = None if zeros is None else zeros.astype(jnp.float32)
    upper = [-(UPPER_BASE if zeros is None else zeros + UPPER_BASE) * scales] if codes_dtype == jnp.int8 else []
    return [scales, *upper, *([] if zeros is None else [-zeros * scales])]
