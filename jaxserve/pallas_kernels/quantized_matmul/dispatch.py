"""Which way a product with a quantized weight goes on a GPU: all thresholds and cuts, by measurements (docs/performance_gpu.md)."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxserve.pallas_kernels.gpu import Gpu
from jaxserve.pallas_kernels.matmul.mosaic_wide import WideMatmulConfig
from jaxserve.pallas_kernels.mosaic import HEIGHT
from jaxserve.pallas_kernels.quantized_matmul.mosaic import MosaicQuantizedConfig, token_tiles
from jaxserve.pallas_kernels.quantized_matmul.mosaic_eight_bit import MosaicEightBitConfig
from jaxserve.pallas_kernels.quantized_matmul.mosaic_four_bit import MOST_LANES, MosaicFourBitConfig
from jaxserve.pallas_kernels.quantized_matmul.mosaic_wide import WideQuantizedConfig, wide_token_tiles
from jaxserve.pallas_kernels.quantized_matmul.triton import TritonQuantizedConfig
from jaxserve.pallas_kernels.quantized_matmul.weights import BLOCK, EightBitWeight, FourBitWeight

# At most so many tokens go to Triton's kernel; more are cuBLAS's, with a weight that was widened before.
_MOST_KERNEL_TOKENS = 256
_MOST_MOSAIC_TOKENS = 256
_LEAST_WIDE_TOKENS = 129
_LEAST_TABLED_TOKENS = 33  # with a table, which Mosaic's kernels for fewer do not take; predicted by what integers take
_LEAST_MOSAIC_TOKENS = 17
_ENOUGH_BLOCKS = 0.8  # for each multiprocessor, of a gated product, whose columns are not split
_BUSY_SHARE = 0.85  # of the multiprocessors draw all that the memory gives
_LEAST_STAGES = 3
_SMEM_BYTES = 225 * 1024  # of a block of Mosaic's, but for its barriers
_LEAST_COPY_BYTES = 128  # of a copy to SMEM, and what its bytes are a multiple of
# From so many on, 8-bit products win where activations may be rounded and Mosaic does not take the weight; where it does, beyond so many.
_LEAST_EIGHT_BIT_TOKENS = 33
_MOST_UNROUNDED_TOKENS = 64, 32  # the latter of weights whose rows fill all multiprocessors in tiles of 128
_MOST_GATED_LANES = 64  # whose sums of gate and up fit into registers
_LEAST_GATED_TOKENS = 1024  # for which SwiGLU within an 8-bit product wins
_LEAST_SPLIT_BLOCKS = 4  # blocks of 128 columns in a share
# Of the kernel that widens codes in registers, fitted to the cuts that were measured with 4 bits.
_CYCLE_PRODUCTS = 2048  # of a multiprocessor's tensor cores
_STEP_CYCLES = 175  # of a warpgroup for 64 columns, beside the products
_GROUP_STEP_CYCLES = 200  # of 8 bits in groups: predicted, 310 to 331 instructions where 4 bits take 284 and 8 bits with a scale a row 269
_TILE_CYCLES = 3000  # in which the tensor cores wait
_CYCLE_BYTES = 1700  # of parts that are written and read again, of all multiprocessors together
_PANEL = 4  # tiles of 256 tokens
_MOST_TURN_TOKENS = 256  # of a gated product; with more, warpgroups that take turns are slower


def takes_eight_bit_products(x: jax.Array, weight: EightBitWeight, gpu: Gpu) -> bool:
    """Whether x [T, K] is rounded and multiplied in 8 bits; float8 needs a Hopper GPU, cuBLASLt multiples of 16."""
    if not weight.quantized_activations or weight.zeros is not None or weight.scales.shape[0] > 1:
        return False
    fits = all(length % 16 == 0 for length in (*x.shape, weight.shape[0]))
    return fits and x.shape[0] >= _LEAST_EIGHT_BIT_TOKENS and (gpu.is_hopper or weight.codes.dtype == jnp.int8)


def wide_eight_bit_config(x: jax.Array, weight: EightBitWeight, gpu: Gpu) -> WideMatmulConfig | None:
    """The cut of Hopper's kernel for many tokens for a gated product of x [T, K] in 8 bits; None where a library's goes."""
    (num_tokens, depth), size = x.shape, weight.shape[0]
    fits = num_tokens % 256 == size % 256 == depth % BLOCK == 0 and x.dtype == jnp.bfloat16 and weight.codes.dtype == jnp.float8_e4m3fn
    if not gpu.is_hopper or not fits or num_tokens < _LEAST_GATED_TOKENS or not takes_eight_bit_products(x, weight, gpu):
        return None
    return WideMatmulConfig(2, 128, 128, 1, 4, gpu.num_multiprocessors, row_cluster=2, panel=8)


def eight_bit_config(
    x: jax.Array, weight: FourBitWeight | EightBitWeight, out_dtype: jnp.dtype, gpu: Gpu, gated: bool = False
) -> MosaicEightBitConfig | None:
    """The cut of Hopper's kernel for few tokens, x [T, K], 8 bits with a scale a row; None where it does not go or 8-bit products win."""
    (num_tokens, depth), halves = x.shape, 2 if gated else 1
    size = weight.shape[0] // halves
    if not isinstance(weight, EightBitWeight) or weight.scales.shape[0] > 1 or num_tokens > _MOST_MOSAIC_TOKENS:
        return None
    fills = weight.shape[0] >= 2 * HEIGHT * gpu.num_multiprocessors
    if num_tokens > _MOST_UNROUNDED_TOKENS[fills] and takes_eight_bit_products(x, weight, gpu):
        return None
    lanes, tiles = token_tiles(num_tokens)
    few = size < _ENOUGH_BLOCKS * gpu.num_multiprocessors * HEIGHT
    if not _mosaic_takes(x, weight, out_dtype, gpu) or (gated and (size % HEIGHT or few or lanes > _MOST_GATED_LANES)):
        return None

    def cost(cut: tuple[int, int]) -> float:
        """Bytes of codes, of tokens for each tile and of parts, written and read; more where multiprocessors share them unequally."""
        teams, splits = cut
        chunks = size // (teams * HEIGHT) * splits * tiles
        largest = pl.cdiv(chunks, gpu.num_multiprocessors) * gpu.num_multiprocessors / chunks  # of a multiprocessor, beside the mean
        parts = 0 if splits == 1 else 8 * splits * lanes * tiles * size
        moved = halves * size * depth * tiles * (1 + 2 * lanes / (halves * teams * HEIGHT)) + parts
        return moved * max(1.0, _BUSY_SHARE * largest)

    teams, splits = min(
        _row_cuts(size, depth, (3, 2, 1) if lanes <= 32 and not gated else (2, 1), (1,) if gated else (1, 2, 4, 8)), key=cost
    )
    out = teams * (1 if splits == 1 else 2) * lanes * HEIGHT * 2

    def stages(columns: int) -> int:
        return min(8, (_SMEM_BYTES - out) // (columns * (halves * teams * HEIGHT + 2 * lanes)))

    # 256 bytes of a row at once draw 5 to 8 % more from the memory than 128.
    columns = 2 * BLOCK if lanes <= 32 and depth % (2 * BLOCK * splits) == 0 and stages(2 * BLOCK) >= _LEAST_STAGES else BLOCK
    return MosaicEightBitConfig(teams, splits, columns, stages(columns), gpu.num_multiprocessors)


def _row_cuts(size: int, depth: int, teams: tuple[int, ...], splits: tuple[int, ...]) -> list[tuple[int, int]]:
    """Which of the numbers of warpgroups, 64 rows each, and of shares of the columns cut [size, depth] evenly."""
    return [
        (t, s)
        for t in teams
        for s in splits
        if size % (t * HEIGHT) == 0 and depth % (s * BLOCK) == 0 and (s == 1 or depth >= s * BLOCK * _LEAST_SPLIT_BLOCKS)
    ]


def mosaic_config(
    x: jax.Array, weight: FourBitWeight | EightBitWeight, out_dtype: jnp.dtype, gpu: Gpu, gated: bool = False
) -> MosaicQuantizedConfig | None:
    """The cut of Hopper's kernel for x [T, K]; None where it is not the fastest or does not take the arrays."""
    (num_tokens, depth), size = x.shape, weight.shape[0]
    if not _LEAST_MOSAIC_TOKENS <= num_tokens <= _MOST_MOSAIC_TOKENS or not _mosaic_takes(x, weight, out_dtype, gpu):
        return None
    lanes, tiles = token_tiles(num_tokens)
    # With more tokens deep stages are worth more than shared tokens.
    teams = tuple(t for t in ((4, 3, 2, 1) if lanes <= 32 else (2, 1)) if (t % 2 == 0 or not gated) and _copies_zeros(weight, t))
    cuts = _row_cuts(size, depth, teams, (1,) if gated else (1, 2, 4, 8))

    code_bytes = HEIGHT * BLOCK // (2 if isinstance(weight, FourBitWeight) else 1)

    def cost(cut: tuple[int, int]) -> float:
        """Bytes of codes, of tokens for each tile and of parts, written and read; more where multiprocessors share them unequally."""
        teams, splits = cut
        chunks = size // (teams * HEIGHT) * splits * tiles
        largest = pl.cdiv(chunks, gpu.num_multiprocessors) * gpu.num_multiprocessors / chunks  # of a multiprocessor, beside the mean
        parts = 0 if splits == 1 else 8 * splits * lanes * tiles * size
        moved = size * depth / (HEIGHT * BLOCK) * tiles * (code_bytes + 2 * lanes * BLOCK / teams) + parts
        return moved * max(1.0, _BUSY_SHARE * largest)

    if not cuts or (gated and size // (cuts[-1][0] * HEIGHT) < _ENOUGH_BLOCKS * gpu.num_multiprocessors):
        return None
    teams, splits = min(cuts, key=cost)
    groups = max(1, BLOCK // weight.group)
    stage = teams * (code_bytes + groups * HEIGHT * (weight.scales.dtype.itemsize + 1)) + 2 * lanes * BLOCK
    out = teams * (1 if splits == 1 else 2) * lanes * HEIGHT * 2
    # 256 columns at once: with 64 tokens 4 us less of 44, with fewer as long or longer (docs/performance_gpu.md). No group is cut; small
    # ones and many tokens would spill.
    even = splits == 1 and depth % (2 * BLOCK) == 0 and max(weight.group, 2 * BLOCK) % (2 * BLOCK) == 0
    faster = 32 < lanes <= 64 and weight.group >= BLOCK
    width = 2 if even and faster and (_SMEM_BYTES - out) // (2 * stage) >= _LEAST_STAGES else 1
    return MosaicQuantizedConfig(teams, splits, min(8, (_SMEM_BYTES - out) // (width * stage)), gpu.num_multiprocessors, width)


def four_bit_config(
    x: jax.Array, weight: FourBitWeight | EightBitWeight, out_dtype: jnp.dtype, gpu: Gpu, gated: bool = False
) -> MosaicFourBitConfig | None:
    """The cut of Hopper's kernel for few tokens, x [T, K], 4 bits; None where it is not the fastest or does not take the arrays."""
    (num_tokens, depth), size = x.shape, weight.shape[0]
    takes = isinstance(weight, FourBitWeight) and num_tokens <= MOST_LANES and _mosaic_takes(x, weight, out_dtype, gpu)
    if not takes or not _is_large(weight, gpu) or (gated and size % (2 * HEIGHT)):
        return None
    teams, heights = next((t, h) for t, h in ((2, 2), (1, 2), (1, 1)) if size % (t * h * HEIGHT) == 0)
    if not _copies_zeros(weight, teams * heights):
        return None
    lanes, groups = pl.cdiv(num_tokens, 8) * 8, max(1, BLOCK // weight.group)
    # With more than 8 tokens the sums would spill in the registers that two shares leave, and one is faster.
    shares = 2 if lanes == 8 and depth % (2 * BLOCK) == 0 else 1
    width = 2 if depth % (2 * shares * BLOCK) == 0 else 1
    of_rows = BLOCK // 2 + groups * (weight.scales.dtype.itemsize + (weight.zeros is not None))
    stage = width * (teams * heights * HEIGHT * of_rows + lanes * (2 * BLOCK + 4 * groups))
    out = teams * heights * HEIGHT * lanes * (2 + 4 * (shares - 1))
    stages = min(8 // width, (_SMEM_BYTES - out) // stage) // shares * shares
    return MosaicFourBitConfig(teams, shares, heights, 1, width, stages, gpu.num_multiprocessors)


def widening_config(
    x: jax.Array, weight: FourBitWeight | EightBitWeight, out_dtype: jnp.dtype, gpu: Gpu, gated: bool = False
) -> WideQuantizedConfig | None:
    """The cut of Hopper's kernel for many tokens, x [T, K], that widens codes in registers; None where it is not the fastest or does not
    take the arrays.
    """
    (num_tokens, depth), size = x.shape, weight.shape[0]
    if not _mosaic_fits(x, weight, out_dtype, gpu):
        return None
    if num_tokens < (_LEAST_TABLED_TOKENS if _has_table(weight) else _LEAST_WIDE_TOKENS):
        return None
    if isinstance(weight, FourBitWeight):
        code_bytes, corrections, step_cycles = BLOCK // 2, (weight.zeros, weight.minima), _STEP_CYCLES
        if weight.minima is not None and (weight.zeros is not None or _has_table(weight)):
            return None
    else:
        code_bytes, corrections = BLOCK, (weight.zeros,)
        step_cycles = _STEP_CYCLES if weight.scales.shape[0] == 1 else _GROUP_STEP_CYCLES
        if takes_eight_bit_products(x, weight, gpu):
            return None
    cuts = [
        (teams, tokens, splits, cluster)
        for teams, tokens in ((2, 256), (2, 128), (3, 128))
        for splits in (1, 2, 4)
        for cluster in (2, 1)
        if size % (teams * cluster * HEIGHT) == 0 and depth % (splits * BLOCK) == 0 and depth >= splits * BLOCK * _LEAST_SPLIT_BLOCKS
        if ((teams, splits) == (2, 1) or not gated) and _copies_zeros(weight, teams)
    ]

    def cost(cut: tuple[int, int, int, int]) -> float:
        """Cycles of a multiprocessor."""
        teams, most, splits, cluster = cut
        lanes, tiles = wide_token_tiles(num_tokens, most)
        chunks = size // (teams * cluster * HEIGHT) * tiles * splits
        step = teams * (HEIGHT * lanes * HEIGHT / _CYCLE_PRODUCTS + step_cycles)
        tile = step * depth / splits / HEIGHT + _TILE_CYCLES
        parts = 0 if splits == 1 else 8 * splits * num_tokens * size / _CYCLE_BYTES
        return pl.cdiv(chunks, gpu.num_multiprocessors // cluster) * tile * (1.0 if cluster > 1 else 1.05) + parts

    if not cuts:
        return None
    teams, most, splits, cluster = min(cuts, key=cost)
    lanes, _ = wide_token_tiles(num_tokens, most)
    code_stages = 3 if lanes > 160 else 4
    of_group = weight.scales.dtype.itemsize + sum(x.dtype.itemsize for x in corrections if x is not None)
    codes = code_stages * teams * HEIGHT * (code_bytes + max(1, BLOCK // weight.group) * of_group)
    out = 2 * teams * HEIGHT * HEIGHT * 2 if lanes % HEIGHT == 0 else 8 * HEIGHT * HEIGHT
    stages = min(8, (_SMEM_BYTES - codes - out) // (lanes * BLOCK))
    takes_turns = gated and num_tokens <= _MOST_TURN_TOKENS
    return WideQuantizedConfig(teams, most, splits, stages, code_stages, gpu.num_multiprocessors, cluster, _PANEL, takes_turns)


def _mosaic_fits(x: jax.Array, weight: FourBitWeight | EightBitWeight, out_dtype: jnp.dtype, gpu: Gpu) -> bool:
    """Whether this is a Hopper GPU, and the arrays have dtypes and shapes that Mosaic's kernels multiply."""
    size, depth = weight.shape
    is_half = x.dtype in (jnp.bfloat16, jnp.float16) and out_dtype == x.dtype
    return gpu.is_hopper and is_half and size % HEIGHT == 0 and depth % BLOCK == 0


def _mosaic_takes(x: jax.Array, weight: FourBitWeight | EightBitWeight, out_dtype: jnp.dtype, gpu: Gpu) -> bool:
    """Whether Mosaic's kernels for few tokens take the arrays, too: no tables."""
    return _mosaic_fits(x, weight, out_dtype, gpu) and not _has_table(weight)


def _has_table(weight: FourBitWeight | EightBitWeight) -> bool:
    return isinstance(weight, FourBitWeight) and weight.values not in (None, tuple(range(16)))


def _copies_zeros(weight: FourBitWeight | EightBitWeight, teams: int) -> bool:
    """Whether the zeros that so many warpgroups need for a block of columns are a number of bytes that Mosaic copies to SMEM."""
    if not isinstance(weight, FourBitWeight) or weight.zeros is None:
        return True
    return teams * HEIGHT * max(1, BLOCK // weight.group) * weight.zeros.dtype.itemsize % _LEAST_COPY_BYTES == 0


def _is_large(weight: FourBitWeight | EightBitWeight, gpu: Gpu) -> bool:
    """Whether a 4-bit weight keeps all multiprocessors busy in tiles of 64 rows, three each."""
    return isinstance(weight, FourBitWeight) and weight.shape[0] >= 2.9 * gpu.num_multiprocessors * 64


def triton_config(x: jax.Array, weight: FourBitWeight | EightBitWeight, gpu: Gpu) -> TritonQuantizedConfig | None:
    """The kernel's cut for x [T, K]; None where it is not the fastest or does not take the arrays."""
    (num_tokens, depth), size = x.shape, weight.shape[0]
    if num_tokens > _MOST_KERNEL_TOKENS or x.dtype not in (jnp.bfloat16, jnp.float16):
        return None
    tokens = min(64 if num_tokens <= 128 else 128, max(16, pl.next_power_of_2(num_tokens)))
    tile, num_warps, num_stages, programs_a_multiprocessor = (64, 2, 4, 2.9) if tokens == 16 else (128, 8, 4, 1.4)
    uncut = isinstance(weight, FourBitWeight) and size >= programs_a_multiprocessor * gpu.num_multiprocessors * tile
    if uncut and tokens > 16:
        tile, num_stages = 256, 3
    if tokens == 128:
        tile, num_stages = 128, 3
    while tile > 16 and size % tile and size < tile * gpu.num_multiprocessors:
        tile //= 2
    num_warps = min(num_warps, max(1, tile // 16))
    programs = pl.cdiv(size, tile) * pl.cdiv(num_tokens, tokens)
    most = max(1, pl.cdiv(depth, BLOCK) // _LEAST_SPLIT_BLOCKS)
    splits = 1
    while not uncut and programs * splits < programs_a_multiprocessor * gpu.num_multiprocessors and 2 * splits <= most:
        splits *= 2
    return TritonQuantizedConfig(tile, tokens, 1, splits, num_warps, num_stages)
