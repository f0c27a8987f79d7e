"""Few tokens times a large weight for sm_90 (Hopper), in Pallas Mosaic GPU: as fast as the weight can be read.

The weight is wgmma's left operand, 64 of its rows at a time, and the tokens are the narrow side, so that a small batch wastes
nothing. A block of threads has two warpgroups: one fetches by TMA and runs ahead over the borders of tiles, one computes. The work is
cut so that each block reads as many bytes as every other; where the rows of a weight are too few for that, its columns are cut too, and
the partial sums go to the reader, which adds them up in a fixed order. A gated product takes gate and up rows of the same units in one
tile, so that SwiGLU needs no pass of its own.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxserve.pallas_kernels.float16 import narrowed
from jaxserve.pallas_kernels.mosaic import HEIGHT, empty_slot, even_workers, filled_slot, lane_semantics, see_out, swizzled

_SMEM_BYTES = 226 * 1024  # of a block, but for its barriers
_MOST_TOKENS = 128
_FEW_TOKENS = 32
_FEWEST_BYTES, _FEWEST_BYTES_OF_MANY = 8 * 2**20, 32 * 2**20  # of a weight, with few tokens and with more


@dataclass(frozen=True)
class MosaicMatmulConfig:
    """How the kernel is cut.

    Attributes:
        tile: rows of the weight a block computes at once, a multiple of 64.
        splits: shares of the columns, each with partial sums of its own.
        block_k: columns fetched at once.
        num_stages: fetches in flight.
        num_blocks: at most so many blocks of threads; each walks several tiles if there are more.
        cluster: blocks that fetch the tokens together, each a share for all of them.
        in_order: columns are added up from the first on, for bits that no cut changes (fixed_order.py).
    """

    tile: int
    splits: int
    block_k: int
    num_stages: int
    num_blocks: int
    cluster: int = 1
    in_order: bool = False

    @classmethod
    def suited(cls, x: jax.Array, weight: jax.Array, num_multiprocessors: int, gated: bool = False) -> "MosaicMatmulConfig | None":
        """The cut for x [T, K] and weight [N, K]; None where the kernel does not go or XLA's products are as fast.

        By measurements on an H200 (docs/performance_gpu.md); of small weights with many tokens there are none.
        """
        (num_tokens, depth), size = x.shape, weight.shape[0]
        fewest_bytes = _FEWEST_BYTES if num_tokens <= _FEW_TOKENS else _FEWEST_BYTES_OF_MANY
        if (
            x.dtype not in (jnp.bfloat16, jnp.float16)
            or weight.dtype != x.dtype
            or num_tokens > _MOST_TOKENS
            or 2 * size * depth < fewest_bytes
        ):
            return None
        lanes = _lanes(num_tokens)
        enough = 0.7 * num_multiprocessors  # fewer blocks do not draw all that the memory gives
        tile = 2 * HEIGHT if size % (2 * HEIGHT) == 0 and size // (2 * HEIGHT) >= enough else HEIGHT
        splits = next((splits for splits in (1, 2, 4, 8) if size // tile * splits >= enough), 0)
        block_k = next((width for width in (128, 64) if splits and depth % (splits * width) == 0), 0)
        partial_share = 0 if splits == 1 else 2 * splits * lanes / depth  # bytes of partial sums a byte of the weight
        if size % tile or block_k == 0 or partial_share > 1 / 8:
            return None
        if gated and (splits > 1 or tile != 2 * HEIGHT):  # a tile is 64 rows of each half
            return None
        # A cluster's blocks wait for each other: it pays where the tokens are as many bytes as the tile.
        cluster = 2 if lanes > 64 and lanes % 16 == 0 and size % (2 * tile) == 0 else 1
        return cls(tile, splits, block_k, few_token_stages(tile, lanes, block_k), num_multiprocessors, cluster)


def few_token_stages(tile: int, lanes: int, block_k: int) -> int:
    """Fetches in flight for which a block has memory; `lanes` are tokens, a multiple of 8."""
    return min(8, (_SMEM_BYTES - 4 * lanes * HEIGHT) // (2 * (tile + lanes) * block_k))


def _lanes(num_tokens: int) -> int:
    return pl.cdiv(num_tokens, 8) * 8


@functools.partial(jax.jit, static_argnames=("config", "gated", "out_dtype", "interpret"))
def matmul_mosaic(
    x: jax.Array,
    weight: jax.Array,
    *,
    config: MosaicMatmulConfig,
    gated: bool = False,
    out_dtype: jnp.dtype | None = None,
    interpret: bool = False,
) -> jax.Array:
    """x [T, K] times the transposed weight [N, K], both bfloat16 or float16; the same bits in every run.

    Returns:
        [P, T, N] in out_dtype (None: x's), parts whose sum is the product: one, or two for each split. A partial sum leaves it as two
        numbers, itself and what rounding it left over (in bfloat16 16 bits of its float32's 24): only 16-bit numbers go transposed to
        SMEM. Gated: silu(gate) * up, [1, T, N / 2], of the weight's gate rows and the up rows after them; a tile is half of each.
    """
    num_tokens, out_dtype = x.shape[0], jnp.dtype(out_dtype or x.dtype)
    size = weight.shape[0] // (2 if gated else 1)
    width = config.tile // (2 if gated else 1)
    lanes = _lanes(num_tokens)
    chunks = size // (width * config.cluster) * config.splits
    workers = even_workers(chunks, config.num_blocks // config.cluster)
    planes = 1 if config.splits == 1 else 2
    tiled = swizzled(config.block_k, x.dtype)
    emptied = plgpu.Barrier(num_barriers=config.num_stages)
    if config.cluster > 1:
        emptied = plgpu.ClusterBarrier(collective_axes=("member",), num_barriers=config.num_stages)
    parts = plgpu.kernel(
        functools.partial(_matmul_kernel, config=config, gated=gated, chunks=chunks, workers=workers),
        out_type=jax.ShapeDtypeStruct((config.splits * planes, lanes, size), out_dtype),
        scratch_types=(
            plgpu.SMEM((config.num_stages, config.tile, config.block_k), x.dtype, transforms=tiled),
            plgpu.SMEM((config.num_stages, lanes, config.block_k), x.dtype, transforms=tiled),
            plgpu.SMEM((planes, lanes, HEIGHT), out_dtype, transforms=swizzled(HEIGHT // 2, out_dtype)),
            plgpu.Barrier(num_arrivals=3 if gated else 2, num_barriers=config.num_stages),
            emptied,
        ),
        grid=(workers,),
        grid_names=("worker",),
        cluster=(config.cluster,) if config.cluster > 1 else (),
        cluster_names=("member",) if config.cluster > 1 else (),
        num_threads=2,
        thread_name="warpgroup",
        compiler_params=lane_semantics(approx_math=gated),  # as mosaic_wide.py's: SwiGLU has the same bits
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )(jnp.pad(x, ((0, lanes - num_tokens), (0, 0))), weight)
    return parts[:, :num_tokens]


def _matmul_kernel(
    x_ref, weight_ref, parts_ref, weight_smem, x_smem, out_smem, filled, emptied,
    *, config: MosaicMatmulConfig, gated: bool, chunks: int, workers: int,
):  # fmt: skip
    halves = 2 if gated else 1
    width, size = config.tile // halves, parts_ref.shape[2]
    tile, block_k = config.tile, config.block_k
    splits, planes = jnp.int32(config.splits), out_smem.shape[0]
    lanes, depth = x_ref.shape
    steps = depth // config.splits // block_k
    worker = lax.axis_index("worker")
    warpgroup = lax.axis_index("warpgroup")
    member = lax.axis_index("member") if config.cluster > 1 else 0
    sharers = "member" if config.cluster > 1 else None
    begin, end = lax.div(worker * chunks, jnp.int32(workers)), lax.div((worker + 1) * chunks, jnp.int32(workers))
    tops = range(0, tile, HEIGHT)

    def first_row(chunk):
        return (lax.div(chunk, splits) * config.cluster + member) * width

    @pl.when(warpgroup == 1)
    def _fetch():
        def fetch_chunk(chunk, count):
            row = pl.multiple_of(first_row(chunk), width)
            share = lax.rem(chunk, splits) * (steps * block_k)

            def step(i, count):
                slot = empty_slot(emptied, count)
                # Blocks start at different columns: together at the same ones they would crowd some of the memory's channels.
                first = 0 if config.in_order else worker
                column = share + lax.rem(i + first, jnp.int32(steps)) * block_k
                columns = pl.ds(pl.multiple_of(column, block_k), block_k)
                for half in range(halves):
                    source = weight_ref.at[pl.ds(row + half * size, width), columns]
                    plgpu.copy_gmem_to_smem(source, weight_smem.at[slot, pl.ds(half * width, width)], filled.at[slot])
                plgpu.copy_gmem_to_smem(x_ref.at[:, columns], x_smem.at[slot], filled.at[slot], collective_axes=sharers)
                return count + 1

            return lax.fori_loop(0, steps, step, count)

        count = lax.fori_loop(begin, end, fetch_chunk, jnp.int32(0))
        see_out(emptied, count)

    @pl.when(warpgroup == 0)
    def _compute():
        def compute_chunk(chunk, count):
            def accumulate(*sums):
                def step(i, count):
                    del i
                    slot = filled_slot(filled, count)
                    for total, top in zip(sums, tops, strict=True):
                        plgpu.wgmma(total, weight_smem.at[slot, pl.ds(top, HEIGHT)], x_smem.at[slot].transpose((1, 0)))
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(emptied.at[slot])
                    return count + 1

                return lax.fori_loop(0, steps, step, count), [total[...] for total in sums]

            accumulators = [plgpu.WGMMAAccumulatorRef((HEIGHT, lanes), jnp.float32) for _ in tops]
            count, sums = pl.run_scoped(accumulate, *accumulators)
            if gated:
                sums = [gate / (1 + jnp.exp(-gate)) * up for gate, up in zip(sums[: len(sums) // 2], sums[len(sums) // 2 :], strict=True)]
            place = lax.rem(chunk, splits) * planes
            for rest, top in zip(sums, range(0, width, HEIGHT), strict=True):
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                for plane in range(planes):
                    part = narrowed(rest, parts_ref.dtype)
                    out_smem.at[plane].transpose((1, 0))[...] = part
                    if plane + 1 < planes:
                        rest = rest - part.astype(jnp.float32)
                plgpu.commit_smem()
                rows = pl.ds(pl.multiple_of(first_row(chunk) + top, HEIGHT), HEIGHT)
                for plane in range(planes):
                    plgpu.copy_smem_to_gmem(out_smem.at[plane], parts_ref.at[place + plane, :, rows])
            return count

        lax.fori_loop(begin, end, compute_chunk, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)
