"""Residual addition and root mean square norm for NVIDIA GPUs from sm_80 on, in Pallas-Triton: each row is read once."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jaxserve.pallas_kernels.add_rms_norm.reference import added, weighted


@dataclass(frozen=True)
class AddRMSNormConfig:
    """How the kernel is cut: rows and warps a program."""

    block_rows: int
    num_warps: int

    @classmethod
    def suited(cls, x: jax.Array) -> "AddRMSNormConfig":
        """The cut for x [..., K] measured best (docs/performance_gpu.md): 16 bytes of a row a thread, until that makes 16 warps."""
        return cls(1, max(1, min(16, pl.next_power_of_2(x.shape[-1]) // 256)))


@functools.partial(jax.jit, static_argnames=("eps", "dtype", "config", "interpret"))
def add_rms_norm_triton(
    x: jax.Array,
    residual: jax.Array,
    weight: jax.Array,
    eps: float,
    dtype: jnp.dtype | None = None,
    *,
    config: AddRMSNormConfig,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """As `add_rms_norm`; the sum takes the residual's memory. A row is held in registers: K up to 16384."""
    num_tokens, size = residual.shape
    parts = x if x.ndim == 3 else x[None]
    padded = pl.next_power_of_2(size)
    rows = pl.BlockSpec((config.block_rows, padded), lambda i: (i, 0))
    return pl.pallas_call(
        functools.partial(_add_rms_norm_kernel, num_tokens=num_tokens, size=size, eps=eps),
        grid=(pl.cdiv(num_tokens, config.block_rows),),
        in_specs=[
            pl.BlockSpec((parts.shape[0], config.block_rows, padded), lambda i: (0, i, 0)),
            rows,
            pl.BlockSpec((1, padded), lambda i: (0, 0)),
        ],
        out_specs=(rows, rows),
        out_shape=tuple(jax.ShapeDtypeStruct(residual.shape, of) for of in (dtype or residual.dtype, residual.dtype)),
        input_output_aliases={1: 1},
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=1),
        interpret=interpret,
        name="add_rms_norm",
    )(parts, residual, weight[None, :])


def _add_rms_norm_kernel(parts_ref, residual_ref, weight_ref, normed_ref, sum_ref, *, num_tokens: int, size: int, eps: float):
    num_parts, block_rows, padded = parts_ref.shape
    row = pl.program_id(0) * block_rows + jnp.arange(block_rows, dtype=jnp.int32)
    column = jnp.arange(padded, dtype=jnp.int32)[None, :] < size
    present = (row < num_tokens)[:, None] & column
    branch = plt.load(parts_ref.at[jnp.int32(0), :, :], mask=present, other=0.0)
    if num_parts > 1:
        branch = branch.astype(jnp.float32)
        for part in range(1, num_parts):
            branch = branch + plt.load(parts_ref.at[jnp.int32(part), :, :], mask=present, other=0.0).astype(jnp.float32)
    total = added(branch, plt.load(residual_ref.at[:, :], mask=present, other=0.0))
    plt.store(sum_ref.at[:, :], total, mask=present)
    wide = total.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.sum(wide * wide, axis=1) / size + eps)
    weight = plt.load(weight_ref.at[:, :], mask=column, other=0.0)
    plt.store(normed_ref.at[:, :], weighted(wide * scale[:, None], weight, total.dtype, normed_ref.dtype), mask=present)
