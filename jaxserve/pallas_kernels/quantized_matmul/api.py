"""The product of activations and a weight of 4 or 8 bits, whatever the device."""

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels.gpu import Gpu, local_gpu
from jaxserve.pallas_kernels.quantized_matmul.plain import PlainWeight, plain_matmul
from jaxserve.pallas_kernels.quantized_matmul.reference import quantized_matmul_reference
from jaxserve.pallas_kernels.quantized_matmul.weights import EightBitWeight, FourBitWeight


def quantized_matmul(x: jax.Array, weight: FourBitWeight | EightBitWeight | PlainWeight, out_dtype: jnp.dtype) -> jax.Array:
    """x [T, K], bfloat16, float16 or float32, times the transposed weight [N, K], with sums in float32: [T, N] in out_dtype."""
    if isinstance(weight, PlainWeight):
        return plain_matmul(x, weight, out_dtype)
    gpu = local_gpu()
    if gpu is None:
        return quantized_matmul_reference(x, weight, out_dtype)
    return _multiply_on_gpu(jnp.pad(x, ((0, 0), (0, weight.shape[1] - x.shape[1]))), weight, out_dtype, gpu)


def _multiply_on_gpu(x: jax.Array, weight: FourBitWeight | EightBitWeight, out_dtype: jnp.dtype, gpu: Gpu) -> jax.Array:
    # Pallas takes over a second to import: not where there is no GPU.
    from jaxserve.pallas_kernels.quantized_matmul.dispatch import takes_eight_bit_products, triton_config
    from jaxserve.pallas_kernels.quantized_matmul.many_tokens import eight_bit_matmul, widened_matmul
    from jaxserve.pallas_kernels.quantized_matmul.triton import quantized_matmul_triton

    if takes_eight_bit_products(x, weight, gpu):
        return eight_bit_matmul(x, weight, out_dtype)
    config = triton_config(x, weight, gpu)
    if config is None:
        return widened_matmul(x, weight, out_dtype)
    minima = weight.minima if isinstance(weight, FourBitWeight) else _minima(weight)
    if minima is None:
        return quantized_matmul_triton(x, weight, out_dtype, config=config)
    # What a group adds to each of its columns, times the sum of a token's columns.
    sums = x.astype(jnp.float32).reshape(x.shape[0], minima.shape[0], -1).sum(axis=2)
    added = jax.lax.dot_general(sums, minima.astype(jnp.float32), (((1,), (0,)), ((), ())), jax.lax.Precision.HIGHEST)
    return (quantized_matmul_triton(x, weight, jnp.float32, config=config) + added).astype(out_dtype)


def _minima(weight: EightBitWeight) -> jax.Array | None:
    return None if weight.zeros is None else -weight.scales.astype(jnp.float32) * weight.zeros.astype(jnp.float32)
