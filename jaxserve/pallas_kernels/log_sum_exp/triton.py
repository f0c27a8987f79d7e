"""Logarithms of sums of exponentials for NVIDIA GPUs from sm_80 on, in Pallas-Triton: a program a row, which is read twice."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

_BLOCK = 4096  # columns read at once: four a thread
_NUM_WARPS = 32


def log_sum_exp_triton(logits: jax.Array, interpret: bool = False) -> jax.Array:
    """As `log_sum_exp`. A lane of a block has a sum of its own, and these are added up at the end."""
    num_rows, size = logits.shape
    return pl.pallas_call(
        functools.partial(_kernel, size=size),
        grid=(num_rows,),
        in_specs=[pl.no_block_spec],
        out_specs=pl.no_block_spec,
        out_shape=jax.ShapeDtypeStruct((num_rows,), jnp.float32),
        compiler_params=plt.CompilerParams(num_warps=_NUM_WARPS, num_stages=2),
        interpret=interpret,
        name="log_sum_exp",
    )(logits)


def _kernel(logits_ref, out_ref, *, size: int):
    row = pl.program_id(0)

    def fold(function, start):
        def run(i, carry):
            inside = i * _BLOCK + jnp.arange(_BLOCK, dtype=jnp.int32) < size
            return function(carry, plt.load(logits_ref.at[row, pl.ds(i * _BLOCK, _BLOCK)], mask=inside, other=-jnp.inf))

        return lax.fori_loop(0, pl.cdiv(size, _BLOCK), run, jnp.full((_BLOCK,), start, jnp.float32))

    best = jnp.max(fold(jnp.maximum, -jnp.inf))
    out_ref[row] = best + jnp.log(jnp.sum(fold(lambda total, x: total + jnp.exp(x - best), 0.0)))
