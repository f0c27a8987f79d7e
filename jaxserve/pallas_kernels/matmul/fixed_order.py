"""Products on Hopper GPUs that give a token the same bits in a step of any size: the cuts of both Mosaic kernels for them.

A wgmma adds up 16 columns at a time to its float32 sums. So what decides an element's bits is where a run of columns begins and ends that
is added up without a break, in which order the sums of these runs are added, and what is rounded when; not how many tokens or rows a tile
has, nor which of the two is the left operand. Here the runs follow from the weight's shape alone, each is walked from its first column on,
and both kernels give its sum as the same two numbers where there are several.
"""

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxserve.pallas_kernels.matmul.mosaic import MosaicMatmulConfig, few_token_stages, matmul_mosaic
from jaxserve.pallas_kernels.matmul.mosaic_wide import BLOCK_K, WideMatmulConfig, matmul_wide
from jaxserve.pallas_kernels.mosaic import HEIGHT

_MOST_FEW_TOKENS = 128  # of the kernel that is as fast as a weight can be read
_ENOUGH_BLOCKS = 0.7  # for each multiprocessor; fewer do not draw all that the memory gives
_STAGES = 4
_STEP_ROWS = 16  # that take as long as what a step of the wide kernel has to do whatever its rows


def fixed_order_kernel(
    x: jax.Array, weight: jax.Array, num_multiprocessors: int, *, gated: bool = False, out_dtype: jnp.dtype | None = None
) -> Callable[..., jax.Array]:
    """What computes [P, T, N] of x [T, K] and a weight [N, K] that `takes_fixed_order`; P is the same for any T.

    Args:
        gated: silu(gate) * up, whole.
        out_dtype: of the result, x's (None) or another of 16 bits; float32: whole, never in parts.
    """
    (num_tokens, depth), size = x.shape, weight.shape[0]
    whole = gated or out_dtype == jnp.float32
    splits = 1 if whole else column_splits(size, depth, num_multiprocessors)
    if num_tokens <= _MOST_FEW_TOKENS and out_dtype != jnp.float32:
        few = _few_tokens(num_tokens, size, depth, splits, num_multiprocessors, gated)
        return functools.partial(matmul_mosaic, config=few, gated=gated, out_dtype=out_dtype)
    many = _many_tokens(num_tokens, size, splits, num_multiprocessors, gated)
    return functools.partial(matmul_wide, config=many, gated=gated, out_dtype=out_dtype)


def column_splits(size: int, depth: int, num_multiprocessors: int) -> int:
    """Shares of the columns of a weight [size, depth], each with sums of its own: as many as keep a GPU busy with few tokens."""
    cuts = [splits for splits in (1, 2, 4, 8) if depth % (splits * BLOCK_K) == 0]
    return next((splits for splits in cuts if size // HEIGHT * splits >= _ENOUGH_BLOCKS * num_multiprocessors), cuts[-1])


def _few_tokens(num_tokens: int, size: int, depth: int, splits: int, num_multiprocessors: int, gated: bool) -> MosaicMatmulConfig:
    lanes = pl.cdiv(num_tokens, 8) * 8
    wide = size % (2 * HEIGHT) == 0 and size // (2 * HEIGHT) >= _ENOUGH_BLOCKS * num_multiprocessors
    tile = 2 * HEIGHT if gated or wide else HEIGHT
    block_k = 2 * BLOCK_K if depth % (2 * splits * BLOCK_K) == 0 else BLOCK_K
    cluster = 2 if lanes > 64 and lanes % 16 == 0 and size % (2 * tile) == 0 else 1
    return MosaicMatmulConfig(tile, splits, block_k, few_token_stages(tile, lanes, block_k), num_multiprocessors, cluster, in_order=True)


def _many_tokens(num_tokens: int, size: int, splits: int, num_multiprocessors: int, gated: bool) -> WideMatmulConfig:
    """The cut that is done soonest, by the rounds that its tiles make on all multiprocessors."""
    units = size // 2 if gated else size

    def cuts() -> Iterator[tuple[float, WideMatmulConfig]]:
        for tokens, most_rows in ((64, 256), (128, 128)):
            for rows in range(most_rows, 63, -16):
                width = rows // 2 if gated else rows
                pairs = num_tokens > 2 * tokens  # of tiles of tokens, that fetch rows together; else pairs of rows fetch tokens together
                row_cluster = 2 if not pairs and units % (2 * width) == 0 else 1
                if units % width or (pairs and width % 16):  # each of a pair fetches whole groups of eight rows
                    continue
                cluster = (2 if pairs else 1), row_cluster
                tiles = units // width * pl.cdiv(num_tokens, 2 * tokens * cluster[0]) * cluster[0] * splits
                rounds = pl.cdiv(tiles, num_multiprocessors // max(cluster) * max(cluster))
                config = WideMatmulConfig(
                    2, tokens, rows, splits, _STAGES, num_multiprocessors, row_cluster, cluster[0], 8, in_planes=splits > 1
                )
                yield rounds * 2 * tokens * (rows + _STEP_ROWS), config

    return min(cuts(), key=lambda cut: cut[0])[1]
