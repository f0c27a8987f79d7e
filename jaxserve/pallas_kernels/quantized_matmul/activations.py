"""Activations rounded to 8 bits: by XLA, which does it within what comes before, or by a kernel of its own that reads a row once."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

_LEAST = 1e-10  # of a row's largest value
_MOST_COLUMNS = 16384  # that a program holds in registers


def largest_code(dtype: jnp.dtype) -> float:
    """The largest number that codes of this dtype stand for, float8_e4m3fn or int8."""
    return 127.0 if dtype == jnp.int8 else float(jnp.finfo(dtype).max)


def round_activations(x: jax.Array, dtype: jnp.dtype, group: int, x_scale: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """x [T, K] in dtype, float8_e4m3fn or int8, and what to multiply it by, float32 [T, K / group].

    Without `x_scale`, float32 [], a group's largest value fills the range.
    """
    largest = largest_code(dtype)
    grouped = x.astype(jnp.float32).reshape(x.shape[0], -1, group)
    if x_scale is None:
        scales = jnp.maximum(jnp.max(jnp.abs(grouped), axis=2), _LEAST) / largest
    else:
        scales = jnp.broadcast_to(x_scale.astype(jnp.float32), grouped.shape[:2])
    scaled = jnp.clip(grouped / scales[:, :, None], -largest, largest)
    return (jnp.round(scaled) if dtype == jnp.int8 else scaled).astype(dtype).reshape(x.shape), scales


def rounds_by_kernel(x: jax.Array, x_scale: jax.Array | None) -> bool:
    """Whether `round_rows` takes x [T, K]."""
    return x_scale is None and x.shape[1] <= _MOST_COLUMNS


def round_rows(x: jax.Array, dtype: jnp.dtype, *, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
    """As `round_activations` with a group a row and no `x_scale`, by a Triton kernel: codes [T, K] and scales [T, 1]."""
    num_tokens, size = x.shape
    padded = pl.next_power_of_2(size)
    row = pl.BlockSpec((1, padded), lambda i: (i, 0))
    return pl.pallas_call(
        functools.partial(_round_kernel, size=size),
        grid=(num_tokens,),
        in_specs=[row],
        out_specs=(row, pl.BlockSpec((1, 1), lambda i: (i, 0))),
        out_shape=(jax.ShapeDtypeStruct(x.shape, dtype), jax.ShapeDtypeStruct((num_tokens, 1), jnp.float32)),
        compiler_params=plt.CompilerParams(num_warps=max(1, min(16, padded // 512)), num_stages=1),
        interpret=interpret,
        name="round_rows",
    )(x)


def _round_kernel(x_ref, codes_ref, scale_ref, *, size: int):
    present = jnp.arange(x_ref.shape[1], dtype=jnp.int32)[None, :] < size
    x = plt.load(x_ref.at[:, :], mask=present, other=0.0).astype(jnp.float32)
    largest = largest_code(codes_ref.dtype)
    scale = jnp.maximum(jnp.max(jnp.abs(x), axis=1, keepdims=True), _LEAST) / largest
    scaled = jnp.clip(x / scale, -largest, largest)
    if codes_ref.dtype == jnp.int8:
        scaled = _round_to_even(scaled)
    plt.store(codes_ref.at[:, :], scaled.astype(codes_ref.dtype), mask=present)
    scale_ref[:, :] = scale


def _round_to_even(x: jax.Array) -> jax.Array:
    """As jnp.round, which Triton has no operation for."""
    up = jnp.floor(x + 0.5)
    is_odd = up != 2 * jnp.floor(up * 0.5)
    return jnp.where((up - x == 0.5) & is_odd, up - 1, up)
