"""The product of activations and a weight of 4 or 8 bits, whatever the device."""

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels.add_rms_norm import MOST_KERNEL_NORM_TOKENS
from jaxserve.pallas_kernels.gpu import Gpu, local_gpu
from jaxserve.pallas_kernels.matmul import add_matmul, add_parts, gated_matmul, matmul, matmul_parts, multiply_gated
from jaxserve.pallas_kernels.quantized_matmul.cpu import plain_matmul
from jaxserve.pallas_kernels.quantized_matmul.forms import Weight
from jaxserve.pallas_kernels.quantized_matmul.plain import PlainWeight
from jaxserve.pallas_kernels.quantized_matmul.reference import quantized_matmul_reference
from jaxserve.pallas_kernels.quantized_matmul.tiled import TiledWeight, tiled_matmul
from jaxserve.pallas_kernels.quantized_matmul.weights import EightBitWeight, FourBitWeight


def quantized_matmul(x: jax.Array, weight: Weight, out_dtype: jnp.dtype) -> jax.Array:
    """x [T, K], bfloat16, float16 or float32, times the transposed weight [N, K], with sums in float32: [T, N] in out_dtype."""
    return add_parts(_parts(x, weight, out_dtype, after_kernel=False), out_dtype)


def quantized_matmul_parts(x: jax.Array, weight: Weight) -> jax.Array:
    """As `quantized_matmul` in x's dtype, or parts [P, T, N], in x's dtype or float32, for `add_parts` or `add_rms_norm`."""
    return _parts(x, weight, x.dtype, after_kernel=True)


def quantized_gated_matmul(x: jax.Array, weight: Weight) -> jax.Array:
    """silu(gate) * up of x [T, K] and a weight [2 N, K] of gate rows and up rows: [T, N] in x's dtype."""
    gpu = local_gpu()
    if gpu is None:
        return multiply_gated(quantized_matmul(x, weight, x.dtype))
    x = _pad(x, weight)
    product = _gated_kernel(x, weight, gpu)
    if product is not None:
        return product
    parts = _multiply_on_gpu(x, weight, x.dtype, gpu, after_kernel=False)
    return gated_matmul(x, _widened(weight, x.dtype)) if parts is None else multiply_gated(add_parts(parts, x.dtype))


def quantized_add_matmul(x: jax.Array, weight: Weight, residual: jax.Array) -> jax.Array | None:
    """As `add_matmul`: the stream [T, N] plus the product of what is always widened; None where who reads it is to add the product."""
    if local_gpu() is None or not isinstance(weight, PlainWeight):
        return None
    return add_matmul(x, _widened(weight, x.dtype), residual)


def _gated_kernel(x: jax.Array, weight: Weight, gpu: Gpu) -> jax.Array | None:
    """The gated product by a kernel of our own; None: there is none for it."""
    # Pallas takes over a second to import: not where there is no GPU.
    from jaxserve.pallas_kernels.matmul.mosaic_wide import matmul_wide
    from jaxserve.pallas_kernels.quantized_matmul.dispatch import (
        eight_bit_config,
        four_bit_config,
        mosaic_config,
        wide_eight_bit_config,
        widening_config,
    )
    from jaxserve.pallas_kernels.quantized_matmul.mosaic import quantized_matmul_mosaic
    from jaxserve.pallas_kernels.quantized_matmul.mosaic_eight_bit import eight_bit_matmul_mosaic
    from jaxserve.pallas_kernels.quantized_matmul.mosaic_four_bit import four_bit_matmul_mosaic
    from jaxserve.pallas_kernels.quantized_matmul.mosaic_wide import quantized_matmul_wide

    if isinstance(weight, PlainWeight | TiledWeight):
        return None
    wide = widening_config(x, weight, x.dtype, gpu, gated=True)
    if wide is not None:
        return quantized_matmul_wide(x, weight, config=wide, gated=True)[0]
    if isinstance(weight, EightBitWeight):
        config, few = wide_eight_bit_config(x, weight, gpu), eight_bit_config(x, weight, x.dtype, gpu, gated=True)
        if config is not None:
            codes, scales = _round(x, weight, after_kernel=False)
            return matmul_wide(codes, weight.codes, (scales[:, 0], weight.scales[0].astype(jnp.float32)), config=config, gated=True)[0]
        if few is not None and weight.zeros is None:
            return eight_bit_matmul_mosaic(x, weight, config=few, gated=True)[0]
    elif weight.minima is None:
        few, some = four_bit_config(x, weight, x.dtype, gpu, gated=True), mosaic_config(x, weight, x.dtype, gpu, gated=True)
        if few is not None:
            return four_bit_matmul_mosaic(x, weight, config=few, gated=True)[0]
        if some is not None:
            return quantized_matmul_mosaic(x, weight, config=some, gated=True)[0]
    return None


def _pad(x: jax.Array, weight: Weight) -> jax.Array:
    """x with as many columns as the weight."""
    return jnp.pad(x, ((0, 0), (0, weight.shape[1] - x.shape[1])))


def _parts(x: jax.Array, weight: Weight, out_dtype: jnp.dtype, after_kernel: bool) -> jax.Array:
    if isinstance(weight, TiledWeight):
        return tiled_matmul(x, weight, out_dtype)
    gpu = local_gpu()
    if gpu is None:
        if isinstance(weight, PlainWeight):
            return plain_matmul(x, weight, out_dtype)
        return quantized_matmul_reference(x, weight, out_dtype)
    x = _pad(x, weight)
    parts = _multiply_on_gpu(x, weight, out_dtype, gpu, after_kernel)
    if parts is not None:
        return parts
    matrix = _widened(weight, x.dtype)
    return matmul_parts(x, matrix) if out_dtype == x.dtype else matmul(x, matrix, out_dtype)


def _widened(weight: Weight, dtype: jnp.dtype) -> jax.Array:
    """The weight [N, K] in dtype, in the device's memory, for products of 16 bits."""
    if isinstance(weight, PlainWeight | TiledWeight):
        return weight.dequantize(dtype)
    from jaxserve.pallas_kernels.quantized_matmul.many_tokens import widened

    return widened(weight, dtype)


def _multiply_on_gpu(x: jax.Array, weight: Weight, out_dtype: jnp.dtype, gpu: Gpu, after_kernel: bool) -> jax.Array | None:
    """The product, or parts of it, of codes as they are; None: the weight is to be widened before."""
    if isinstance(weight, PlainWeight | TiledWeight):
        return None
    # Pallas takes over a second to import: not where there is no GPU.
    from jaxserve.pallas_kernels.quantized_matmul.dispatch import (
        eight_bit_config,
        four_bit_config,
        mosaic_config,
        takes_eight_bit_products,
        triton_config,
        widening_config,
    )
    from jaxserve.pallas_kernels.quantized_matmul.many_tokens import eight_bit_matmul
    from jaxserve.pallas_kernels.quantized_matmul.mosaic import quantized_matmul_mosaic
    from jaxserve.pallas_kernels.quantized_matmul.mosaic_eight_bit import eight_bit_matmul_mosaic
    from jaxserve.pallas_kernels.quantized_matmul.mosaic_four_bit import four_bit_matmul_mosaic
    from jaxserve.pallas_kernels.quantized_matmul.mosaic_wide import quantized_matmul_wide
    from jaxserve.pallas_kernels.quantized_matmul.triton import quantized_matmul_triton

    wide = widening_config(x, weight, out_dtype, gpu)
    if wide is not None:
        parts = quantized_matmul_wide(x, weight, config=wide)
        return parts[0] if parts.shape[0] == 1 else parts
    # Zeros of 8 bits are minima to the other kernels.
    minima = weight.minima if isinstance(weight, FourBitWeight) else _minima(weight)
    sums_dtype = out_dtype if minima is None else jnp.dtype("float32")
    eight = eight_bit_config(x, weight, sums_dtype, gpu)
    if eight is None and isinstance(weight, EightBitWeight) and takes_eight_bit_products(x, weight, gpu):
        return eight_bit_matmul(*_round(x, weight, after_kernel), weight, out_dtype)
    four, mosaic = four_bit_config(x, weight, sums_dtype, gpu), mosaic_config(x, weight, sums_dtype, gpu)
    triton = triton_config(x, weight, gpu)
    if eight is not None:
        parts = eight_bit_matmul_mosaic(x, weight, config=eight)
    elif four is not None and isinstance(weight, FourBitWeight):
        parts = four_bit_matmul_mosaic(x, weight, config=four)
    elif mosaic is not None:
        parts = quantized_matmul_mosaic(x, weight, config=mosaic)
    elif triton is not None:
        parts = quantized_matmul_triton(x, weight, sums_dtype, config=triton)
    else:
        return None
    parts = parts[0] if parts.shape[0] == 1 else parts
    if minima is None:
        return parts
    # What a group adds to each of its columns, times the sum of a token's columns.
    sums = x.astype(jnp.float32).reshape(x.shape[0], minima.shape[0], -1).sum(axis=2)
    added = jax.lax.dot_general(sums, minima.astype(jnp.float32), (((1,), (0,)), ((), ())), jax.lax.Precision.HIGHEST)
    return (add_parts(parts, sums_dtype) + added).astype(out_dtype)


def _minima(weight: EightBitWeight) -> jax.Array | None:
    return None if weight.zeros is None else -weight.scales.astype(jnp.float32) * weight.zeros.astype(jnp.float32)


def _round(x: jax.Array, weight: EightBitWeight, after_kernel: bool) -> tuple[jax.Array, jax.Array]:
    """x in the codes' dtype and its scales [T, 1]; `after_kernel` where x is no fusion of XLA's that could round it too."""
    from jaxserve.pallas_kernels.quantized_matmul.activations import round_activations, round_rows, rounds_by_kernel

    if (after_kernel or x.shape[0] <= MOST_KERNEL_NORM_TOKENS) and rounds_by_kernel(x, weight.x_scale):
        return round_rows(x, weight.codes.dtype)
    return round_activations(x, weight.codes.dtype, x.shape[1], weight.x_scale)
