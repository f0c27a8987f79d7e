"""Where a model that computes in bfloat16 has float16: as many bytes, and products as fast, but a rounding error an eighth as large.

It is for numbers of a known size (docs/performance_gpu.md, "Right or wrong"). What it cannot hold becomes its largest value, not infinity.
"""

import jax
import jax.numpy as jnp

_MOST = float(jnp.finfo(jnp.float16).max)


def attention_dtype(activations: jnp.dtype) -> jnp.dtype:
    """Of what norms in a layer give, the matrices behind them, queries, keys and values, where all else is of the dtype `activations`."""
    return jnp.dtype(jnp.float16) if activations == jnp.bfloat16 else jnp.dtype(activations)


def narrowed(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """x in a dtype, inside kernels too; in float16 without infinities."""
    if dtype != jnp.float16:
        return x.astype(dtype)
    wide = x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x  # which would round the largest number up
    return jnp.minimum(jnp.maximum(wide, -_MOST), _MOST).astype(dtype)
