"""The product of activations and a weight of 4 or 8 bits, whatever the device."""

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels.quantized_matmul.plain import PlainWeight, plain_matmul
from jaxserve.pallas_kernels.quantized_matmul.reference import quantized_matmul_reference
from jaxserve.pallas_kernels.quantized_matmul.weights import EightBitWeight, FourBitWeight


def quantized_matmul(x: jax.Array, weight: FourBitWeight | EightBitWeight | PlainWeight, out_dtype: jnp.dtype) -> jax.Array:
    """x [T, K], bfloat16, float16 or float32, times the transposed weight [N, K], with sums in float32: [T, N] in out_dtype."""
    if isinstance(weight, PlainWeight):
        return plain_matmul(x, weight, out_dtype)
    return quantized_matmul_reference(x, weight, out_dtype)
