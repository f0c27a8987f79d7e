"""The logarithm of the sum of each row's exponentials, whatever the device."""

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels.gpu import local_gpu


def log_sum_exp(logits: jax.Array) -> jax.Array:
    """float32 [R] of float32 [R, V]. On a GPU a row gets the same bits whatever R is: XLA's reductions are cut by the shape."""
    if local_gpu() is None:
        best = jnp.max(logits, axis=1)
        return best + jnp.log(jnp.sum(jnp.exp(logits - best[:, None]), axis=1))
    # Pallas takes over a second to import: not where there is no GPU.
    from jaxserve.pallas_kernels.log_sum_exp.triton import log_sum_exp_triton

    return log_sum_exp_triton(logits)
