"""The product of activations and a weight, whatever the device."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels.float16 import narrowed
from jaxserve.pallas_kernels.gpu import local_gpu
from jaxserve.pallas_kernels.parts import sum_parts

# XLA's CPU threads share the rows of the left operand: with few tokens the matrix belongs there (up to 1.4 times faster on 2 cores).
SWAPPED_TOKENS = range(8, 33)


def matmul(x: jax.Array, weight: jax.Array, out_dtype: jnp.dtype, fixed_order: bool = False) -> jax.Array:
    """x [T, K] times the transposed weight [N, K], of x's dtype, with sums in float32: [T, N] in out_dtype, x's or float32.

    A batch on a Hopper GPU goes to kernels of our own where they are faster (docs/performance_gpu.md); all else is XLA's.

    Args:
        fixed_order: a token gets the same bits whatever T is; kept where `takes_fixed_order` says so.
    """
    if out_dtype == x.dtype:
        return add_parts(matmul_parts(x, weight, fixed_order=fixed_order), out_dtype)
    kernel = _fixed_order_kernel(x, weight, out_dtype=out_dtype) if fixed_order else None
    return _matmul_xla(x, weight, out_dtype) if kernel is None else kernel(x, weight)[0]


def matmul_parts(x: jax.Array, weight: jax.Array, dtype: jnp.dtype | None = None, fixed_order: bool = False) -> jax.Array:
    """As `matmul`, but the sum of partial results is left to the reader where there are any.

    Args:
        dtype: of what XLA multiplies, x's (None) or float32.
        fixed_order: as in `matmul`.

    Returns:
        [T, N], or parts [P, T, N] for `add_parts` or `add_rms_norm`, in x's dtype or float32.
    """
    kernel = (_fixed_order_kernel(x, weight) if fixed_order else None) or _kernel(x, weight, gated=False)
    if kernel is None:
        return _matmul_xla(x, weight, dtype or x.dtype)
    parts = kernel(x, weight)
    return parts[0] if parts.shape[0] == 1 else parts


def add_matmul(x: jax.Array, weight: jax.Array, residual: jax.Array, fixed_order: bool = False) -> jax.Array | None:
    """The residual stream [T, N] plus x [T, K] times the transposed weight [N, K], in place where nobody needs it as it was.

    None where whoever normalises the sum is to add what `matmul_parts` gives: there is no kernel for it, or `fixed_order` is asked for.
    """
    gpu = local_gpu()
    if gpu is None or not gpu.is_hopper or fixed_order:
        return None
    # Pallas takes over a second to import: not where there is no GPU.
    from jaxserve.pallas_kernels.matmul.mosaic_wide import WideMatmulConfig, add_matmul_wide

    config = WideMatmulConfig.suited_to_add(x, weight, residual, gpu.num_multiprocessors)
    return None if config is None else add_matmul_wide(x, weight, residual, config=config)


def add_parts(parts: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """What `matmul_parts` gives, added up in float32 in the order of the parts: [T, N] in a dtype."""
    return sum_parts(parts).astype(dtype)


def gated_matmul(x: jax.Array, weight: jax.Array, dtype: jnp.dtype | None = None, fixed_order: bool = False) -> jax.Array:
    """silu(gate) * up (Shazeer 2020, arXiv 2002.05202) of x [T, K] and a weight [2 N, K] of gate rows and up rows: [T, N].

    The result is in `dtype`, x's if None. A kernel of our own rounds it alone; elsewhere gate and up are rounded to x's dtype first.
    `fixed_order` as in `matmul`.
    """
    kernel = (_fixed_order_kernel(x, weight, gated=True) if fixed_order else None) or _kernel(x, weight, gated=True)
    return multiply_gated(matmul(x, weight, x.dtype), dtype) if kernel is None else kernel(x, weight, out_dtype=dtype)[0]


def multiply_gated(gate_up: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
    """silu(gate) * up of [T, 2 N], gate columns first: [T, N] in a dtype; in float32 before it, where it is not gate_up's."""
    if dtype is not None and dtype != gate_up.dtype:
        # What a library's product in float16 cannot hold is infinite: no infinity may meet a zero.
        gate_up = narrowed(gate_up, gate_up.dtype).astype(jnp.float32)
    gate, up = jnp.split(gate_up, 2, axis=1)
    return (jax.nn.silu(gate) * up).astype(dtype or gate_up.dtype)


def takes_fixed_order(shape: tuple[int, int], dtype: jnp.dtype, gated: bool = False) -> bool:
    """Whether products with a weight of this shape [N, K] keep what `fixed_order` promises on the device that is traced for."""
    gpu = local_gpu()
    fits = shape[0] % (128 if gated else 64) == shape[1] % 64 == 0
    return gpu is not None and gpu.is_hopper and fits and dtype in (jnp.bfloat16, jnp.float16)


def _fixed_order_kernel(
    x: jax.Array, weight: jax.Array, gated: bool = False, out_dtype: jnp.dtype | None = None
) -> Callable[..., jax.Array] | None:
    """What computes [P, T, N] in an order that T does not change; None: nothing here does."""
    gpu = local_gpu()
    size, depth = weight.shape
    if gpu is None or x.dtype != weight.dtype or not takes_fixed_order((size, depth), x.dtype, gated):
        return None
    from jaxserve.pallas_kernels.matmul.fixed_order import fixed_order_kernel

    return fixed_order_kernel(x, weight, gpu.num_multiprocessors, gated=gated, out_dtype=out_dtype)


def _kernel(x: jax.Array, weight: jax.Array, gated: bool) -> Callable[..., jax.Array] | None:
    """What computes [P, T, N], parts of the product, on this GPU; None: XLA is to."""
    gpu = local_gpu()
    if gpu is None or not gpu.is_hopper:
        return None
    # Pallas takes over a second to import: not where there is no GPU.
    from jaxserve.pallas_kernels.matmul.mosaic import MosaicMatmulConfig, matmul_mosaic

    config = MosaicMatmulConfig.suited(x, weight, gpu.num_multiprocessors, gated)
    if config is not None:
        return functools.partial(matmul_mosaic, config=config, gated=gated)
    from jaxserve.pallas_kernels.matmul.mosaic_wide import WideMatmulConfig, matmul_wide

    wide = WideMatmulConfig.suited(x, weight, gpu.num_multiprocessors, gated)
    return None if wide is None else functools.partial(matmul_wide, config=wide, gated=gated)


def _matmul_xla(x: jax.Array, weight: jax.Array, out_dtype: jnp.dtype) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None

    def product(left: jax.Array, right: jax.Array) -> jax.Array:
        return jax.lax.dot_general(left, right, (((1,), (1,)), ((), ())), precision, out_dtype)

    if x.shape[0] == 1 and out_dtype != x.dtype and local_gpu() is not None:
        # Of one token XLA would make a product of matrix and vector, and for that write the whole weight anew in float32.
        return product(jnp.pad(x, ((0, 1), (0, 0))), weight)[:1]
    if x.shape[0] not in SWAPPED_TOKENS:
        return product(x, weight)
    return jax.lax.platform_dependent(x, weight, cpu=lambda x, weight: product(weight, x).T, default=product)
