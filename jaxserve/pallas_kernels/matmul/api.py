"""The product of activations and a weight, whatever the device."""

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels.gpu import local_gpu

# XLA's CPU threads share the rows of the left operand: with few tokens the matrix belongs there (up to 1.4 times faster on 2 cores).
_SWAPPED_TOKENS = range(8, 33)


def matmul(x: jax.Array, weight: jax.Array, out_dtype: jnp.dtype) -> jax.Array:
    """x [T, K] times the transposed weight [N, K], of x's dtype, with sums in float32: [T, N] in out_dtype, bfloat16 or float32.

    Few tokens on a Hopper GPU go to a kernel of our own where it is faster (docs/performance_gpu.md); all else is XLA's.
    """
    gpu = local_gpu()
    if gpu is not None and gpu.is_hopper and out_dtype == x.dtype:
        # Pallas takes over a second to import: not where there is no GPU.
        from jaxserve.pallas_kernels.matmul.mosaic import MosaicMatmulConfig, matmul_mosaic

        config = MosaicMatmulConfig.suited(x, weight, gpu.num_multiprocessors)
        if config is not None:
            parts = matmul_mosaic(x, weight, config=config)
            return parts[0] if parts.shape[0] == 1 else parts.astype(jnp.float32).sum(axis=0).astype(x.dtype)
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None

    def product(left: jax.Array, right: jax.Array) -> jax.Array:
        return jax.lax.dot_general(left, right, (((1,), (1,)), ((), ())), precision, out_dtype)

    if gpu is not None and x.shape[0] == 1 and out_dtype != x.dtype:
        # Of one token XLA would make a product of matrix and vector, and for that write the whole weight anew in float32.
        return product(jnp.pad(x, ((0, 1), (0, 0))), weight)[:1]
    if x.shape[0] not in _SWAPPED_TOKENS:
        return product(x, weight)
    return jax.lax.platform_dependent(x, weight, cpu=lambda x, weight: product(weight, x).T, default=product)
