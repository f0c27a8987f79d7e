"""Many tokens times a weight of 4 or 8 bits: a weight made 16 bits wide for products of 16 bits, or 8-bit products."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jaxserve.pallas_kernels.quantized_matmul.weights import BLOCK, EightBitWeight, FourBitWeight

_TRANSPOSED = (((1,), (1,)), ((), ()))
_DEQUANTIZED_ROWS = 32  # of a program: 16 bytes of words and 4 stores of 16 bytes a thread


def widened(weight: FourBitWeight | EightBitWeight, dtype: jnp.dtype) -> jax.Array:
    """The weight [N, K] in dtype, written out."""
    if isinstance(weight, FourBitWeight):
        return dequantize_triton(weight, dtype)
    # Without the barrier XLA may widen the codes inside a product of its own, over and over again for each tile of tokens.
    return lax.optimization_barrier(weight.dequantize(dtype))


@functools.partial(jax.jit, static_argnames=("dtype", "interpret"))
def dequantize_triton(weight: FourBitWeight, dtype: jnp.dtype, *, interpret: bool = False) -> jax.Array:
    """The weight [N, K] in dtype."""
    size, depth = weight.shape
    operands = weight.codes, weight.scales, weight.zeros, weight.minima
    return pl.pallas_call(
        functools.partial(_dequantize_kernel, group=weight.group, values=weight.values),
        grid=(pl.cdiv(size, _DEQUANTIZED_ROWS), depth // BLOCK),
        in_specs=jax.tree.map(lambda _: pl.no_block_spec, operands),
        out_specs=pl.no_block_spec,
        out_shape=jax.ShapeDtypeStruct((size, depth), dtype),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="dequantize",
    )(*operands)


def _dequantize_kernel(codes_ref, scales_ref, zeros_ref, minima_ref, out_ref, *, group: int, values: tuple[float, ...] | None):
    tile = _DEQUANTIZED_ROWS, codes_ref.shape[2]
    block = pl.program_id(1)
    # Every index has the shape of the tile, so that nothing moves between threads.
    row = pl.program_id(0) * tile[0] + lax.broadcasted_iota(jnp.int32, tile, 0)
    word = lax.broadcasted_iota(jnp.int32, tile, 1)
    inside = row < codes_ref.shape[1]

    def load(ref, *place):
        return plt.load(ref.at[place], mask=inside, other=jnp.zeros((), ref.dtype))

    words = load(codes_ref, jnp.broadcast_to(block, tile), row, word).astype(jnp.int32)
    for plane in range(4):
        part = jnp.broadcast_to((block * BLOCK + 32 * plane) // group, tile)
        codes = (words >> (4 * plane)) & 15
        if values is None:
            numbers = codes.astype(jnp.float32) - (8.0 if zeros_ref is None else load(zeros_ref, part, row).astype(jnp.float32))
        else:
            numbers = jnp.zeros(tile, jnp.float32)
            for code, value in enumerate(values):
                numbers = jnp.where(codes == code, value, numbers)
        numbers = numbers * load(scales_ref, part, row).astype(jnp.float32)
        if minima_ref is not None:
            numbers = numbers + load(minima_ref, part, row).astype(jnp.float32)
        plt.store(out_ref.at[row, block * BLOCK + 32 * plane + word], numbers.astype(out_ref.dtype), mask=inside)


def eight_bit_matmul(codes: jax.Array, x_scales: jax.Array, weight: EightBitWeight, out_dtype: jnp.dtype) -> jax.Array:
    """Activations of the weight's dtype, codes [T, K] and scales [T, 1], times the transposed weight [N, K] with a scale a row: [T, N].

    Both operands have K contiguous, as cuBLASLt wants 8-bit ones. T, N and K should be multiples of 16.
    """
    # bfloat16: half the bytes to write and to read again; float16 would overflow.
    sums_dtype = jnp.bfloat16 if out_dtype == jnp.bfloat16 else jnp.float32
    sums_dtype = jnp.int32 if weight.codes.dtype == jnp.int8 else sums_dtype
    sums = lax.dot_general(codes, weight.codes, _TRANSPOSED, preferred_element_type=sums_dtype)
    return (sums.astype(jnp.float32) * x_scales * weight.scales.astype(jnp.float32)).astype(out_dtype)
