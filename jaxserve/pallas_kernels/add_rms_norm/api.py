"""Residual addition and root mean square norm in one, whatever the device."""

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels.add_rms_norm.reference import add_rms_norm_reference, rms_norm
from jaxserve.pallas_kernels.gpu import local_gpu

# Beyond it XLA adds in the matrix product before and normalises in one kernel, which moves fewer bytes (docs/performance_gpu.md).
MOST_KERNEL_NORM_TOKENS = 64


def add_rms_norm(
    x: jax.Array | None, residual: jax.Array, weight: jax.Array, eps: float, dtype: jnp.dtype | None = None, fixed_order: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Add a branch's output to the residual stream and normalise the sum for the next branch.

    Root mean square norm (Zhang and Sennrich 2019, arXiv 1910.07467), computed in float32 from the sum as it is stored.

    Args:
        x: [T, K], or parts of it [P, T, K] as `matmul_parts` gives them, in the residual's dtype or float32;
            None: the product before has added it (`add_matmul`), which is of many tokens.
        residual: [T, K].
        weight: [K] of that dtype.
        eps: added to the mean square.
        dtype: of the normalised sum; None: the residual's.
        fixed_order: a token gets the same bits whatever T is, on a GPU.

    Returns:
        The normalised sum, and the sum in the residual's dtype: [T, K]. Parts are added up in float32; only
        the sum with the residual is rounded, as cuBLAS does it where XLA has it add in the product before.

    Raises:
        ValueError: shapes that do not fit together.
    """
    if x is None:
        return rms_norm(residual, weight, eps, dtype), residual
    if x.shape[-2:] != residual.shape or weight.shape != residual.shape[1:]:
        raise ValueError(f"x {x.shape}, residual {residual.shape} and weight {weight.shape} do not go together")
    if local_gpu() is None or (x.ndim == 2 and x.shape[0] > MOST_KERNEL_NORM_TOKENS and not fixed_order):
        return add_rms_norm_reference(x, residual, weight, eps, dtype)
    # Pallas takes over a second to import: not where there is no GPU.
    from jaxserve.pallas_kernels.add_rms_norm.triton import AddRMSNormConfig, add_rms_norm_triton

    return add_rms_norm_triton(x, residual, weight, eps, dtype, config=AddRMSNormConfig.suited(x))
