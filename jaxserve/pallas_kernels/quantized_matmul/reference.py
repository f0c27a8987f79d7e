"""What every implementation must compute, in plain jnp."""

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels.quantized_matmul.weights import EightBitWeight, FourBitWeight


def quantized_matmul_reference(x: jax.Array, weight: FourBitWeight | EightBitWeight, out_dtype: jnp.dtype) -> jax.Array:
    """As `quantized_matmul`, in float32 throughout and with activations as they come."""
    matrix = weight.dequantize(jnp.float32)
    x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, matrix.shape[1] - x.shape[1])))
    return jax.lax.dot_general(x, matrix, (((1,), (1,)), ((), ())), jax.lax.Precision.HIGHEST).astype(out_dtype)
