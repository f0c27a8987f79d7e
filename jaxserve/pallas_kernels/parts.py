"""Parts of a product that are still to be added up."""

import functools
import operator

import jax
import jax.numpy as jnp


def sum_parts(x: jax.Array) -> jax.Array:
    """x [T, N] as it is, or parts of it [P, T, N] added up in float32, in their order: a reduction of XLA's may take another one."""
    return x if x.ndim == 2 else functools.reduce(operator.add, (x[part].astype(jnp.float32) for part in range(x.shape[0])))
