"""Few tokens times a weight of 8 bits with a scale a row for sm_90 (Hopper), in Pallas Mosaic GPU: as fast as the codes can be read.

As matmul/mosaic.py: a warpgroup fetches by TMA and runs ahead over the borders of tiles, others compute. Each of those takes 64 rows of
the tile (of a gated product 64 gate rows and the up rows of the same units) and makes its codes 16 bits wide in registers, in the very
places where wgmma wants its left operand. To float16, because that is one instruction for two float8 numbers where bfloat16 takes five.
So tokens must be float16 too: one more warpgroup converts them in SMEM, once for all rows of the tile.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu.utils import bitcast
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from jaxserve.pallas_kernels.mosaic import (
    BY_ROW,
    FETCH_REGISTERS,
    HEIGHT,
    empty_slot,
    even_workers,
    filled_slot,
    lane_semantics,
    see_out,
    swizzled,
)
from jaxserve.pallas_kernels.quantized_matmul.half_tokens import HALF_FACTOR, halves_in_pairs
from jaxserve.pallas_kernels.quantized_matmul.mosaic import pad_tokens, token_tiles
from jaxserve.pallas_kernels.quantized_matmul.upcast import eight_bit_half_asm
from jaxserve.pallas_kernels.quantized_matmul.weights import BLOCK, EightBitWeight

_PIECE = 32  # columns that are widened and multiplied at once
_FEW_LANES = 32
_CONVERT_REGISTERS = 56


@dataclass(frozen=True)
class MosaicEightBitConfig:
    """How the kernel is cut.

    Attributes:
        warpgroups: that compute; each has 64 rows of a tile, twice if gated.
        splits: shares of the columns, each with partial sums of its own; 1 if gated.
        columns: that are fetched at once, 128 or 256.
        num_stages: fetches in flight.
        num_blocks: at most so many blocks of threads; each walks several tiles if there are more.
    """

    warpgroups: int
    splits: int
    columns: int
    num_stages: int
    num_blocks: int


@functools.partial(jax.jit, static_argnames=("config", "gated", "interpret"))
def eight_bit_matmul_mosaic(
    x: jax.Array, weight: EightBitWeight, *, config: MosaicEightBitConfig, gated: bool = False, interpret: bool = False
) -> jax.Array:
    """x [T, K], bfloat16 or float16, times the transposed weight [N, K] with a scale a row, without its zeros: the same bits in every run.

    bfloat16 tokens are rounded to float16, after a division by 16: what is over 1,048,064 becomes that, the least of 7.6e-6 and more is
    exact, and below that at most 4.8e-7 is lost. N is a multiple of 64 * warpgroups (128 if gated), K of columns * splits.

    Returns:
        [P, T, N] in x's dtype, parts whose sum is the product: one, or two for each split, as matmul_mosaic's. Gated: silu(gate) * up,
        [1, T, N / 2], of the weight's gate rows and the up rows after them.
    """
    (num_tokens, depth), dtype = x.shape, x.dtype
    halves = 2 if gated else 1
    size, teams = weight.shape[0] // halves, config.warpgroups
    lanes, tiles = token_tiles(num_tokens)
    chunks = size // (teams * HEIGHT) * config.splits * tiles
    workers = even_workers(chunks, config.num_blocks)
    planes, width = 1 if config.splits == 1 else 2, config.columns
    x = pad_tokens(x, lanes * tiles, interpret)
    factor = 1.0 if dtype == jnp.float16 else HALF_FACTOR
    if interpret:
        x = (x.astype(jnp.float32) / factor).astype(jnp.float16)
    sums = plgpu.kernel(
        functools.partial(
            _eight_bit_kernel, config=config, gated=gated, factor=factor, chunks=chunks, workers=workers, dtype=dtype, interpret=interpret
        ),
        out_type=jax.ShapeDtypeStruct((config.splits * planes, x.shape[0], size), dtype),
        scratch_types=(
            plgpu.SMEM((config.num_stages, halves * teams, HEIGHT, width), weight.codes.dtype, transforms=swizzled(BLOCK, jnp.int8)),
            plgpu.SMEM((config.num_stages, lanes, width), jnp.float16, transforms=swizzled(_PIECE, jnp.float16)),
            plgpu.SMEM((teams, planes, lanes, HEIGHT), dtype, transforms=swizzled(HEIGHT // 2, dtype)),
            plgpu.Barrier(num_arrivals=1 + halves, num_barriers=config.num_stages),
            plgpu.Barrier(num_barriers=config.num_stages),
            plgpu.Barrier(num_arrivals=teams, num_barriers=config.num_stages),
        ),
        grid=(workers,),
        grid_names=("worker",),
        num_threads=teams + 2,
        thread_name="warpgroup",
        compiler_params=lane_semantics(),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )(
        # Tokens are fetched as they are: their bits alone are float16's until they are converted.
        lax.bitcast_convert_type(x, jnp.float16),
        weight.codes.reshape(-1, HEIGHT, depth),
        weight.scales.reshape(-1, HEIGHT),
    )
    return sums[:, :num_tokens]


def _eight_bit_kernel(
    x_ref, codes_ref, scales_ref, sums_ref, codes_smem, x_smem, out_smem, filled, converted, emptied,
    *, config: MosaicEightBitConfig, gated: bool, factor: float, chunks: int, workers: int, dtype, interpret: bool,
):  # fmt: skip
    halves = 2 if gated else 1
    teams, splits, planes = config.warpgroups, jnp.int32(config.splits), out_smem.shape[1]
    lanes, width = x_smem.shape[1:]
    tiles = jnp.int32(pl.cdiv(x_ref.shape[0], lanes))
    steps = x_ref.shape[1] // width // config.splits
    units = codes_ref.shape[0] // halves
    worker = lax.axis_index("worker")
    warpgroup = lax.axis_index("warpgroup")
    begin, end = lax.div(worker * chunks, jnp.int32(workers)), lax.div((worker + 1) * chunks, jnp.int32(workers))

    def place(chunk):
        """A chunk's first row in units of a wgmma's, its share of the columns, its tile of tokens; what shares codes is neighbours."""
        rest = lax.div(chunk, tiles)
        return lax.div(rest, splits) * teams, lax.rem(rest, splits), pl.ds(lax.rem(chunk, tiles) * lanes, lanes)

    def share_registers(registers: int, action):
        """Many sums and many codes need more registers than a thread's even share."""
        if lanes > _FEW_LANES or halves * width > 2 * BLOCK:
            plgpu.set_max_registers(registers, action=action)

    @pl.when(warpgroup == teams)
    def _fetch():
        share_registers(FETCH_REGISTERS, "decrease")

        def fetch_chunk(chunk, count):
            first, share, tokens = place(chunk)

            def step(i, count):
                slot = empty_slot(emptied, count)
                # Blocks of threads start at different columns: together at the same ones they would crowd some of the memory's channels.
                block = share * steps + lax.rem(i + worker, jnp.int32(steps))
                columns = pl.ds(pl.multiple_of(block * width, width), width)
                for half in range(halves):
                    codes = codes_ref.at[pl.ds(first + half * units, teams), :, columns]
                    plgpu.copy_gmem_to_smem(codes, codes_smem.at[slot, pl.ds(half * teams, teams)], filled.at[slot])
                plgpu.copy_gmem_to_smem(x_ref.at[tokens, columns], x_smem.at[slot], filled.at[slot])
                return count + 1

            return lax.fori_loop(0, steps, step, count)

        count = lax.fori_loop(begin, end, fetch_chunk, jnp.int32(0))
        see_out(emptied, count)

    @pl.when(warpgroup == teams + 1)
    def _convert():
        share_registers(_CONVERT_REGISTERS, "decrease")

        def step(count, carry):
            slot = filled_slot(filled, count)
            if not interpret:
                halves_in_pairs(x_smem.at[slot], dtype)
                plgpu.commit_smem()
            plgpu.barrier_arrive(converted.at[slot])
            return carry

        lax.fori_loop(0, (end - begin) * steps, step, jnp.int32(0))

    @pl.when(warpgroup < teams)
    def _compute():
        # Of what the block was started with: more would be waited for forever.
        registers = 512 // (teams + 2) // 8 * 8 * (teams + 2) - FETCH_REGISTERS - _CONVERT_REGISTERS
        share_registers(min(240, registers // teams // 8 * 8), "increase")

        def read(count):
            slot = filled_slot(filled, count)
            return slot, [codes_smem.at[slot, half * teams + warpgroup] for half in range(halves)]

        def scales_of(chunk):
            heights = [place(chunk)[0] + warpgroup + half * units for half in range(halves)]
            return [plgpu.load(scales_ref.at[height], layout=BY_ROW, optimized=False).astype(jnp.float32) for height in heights]

        def sum_all(count):
            """Columns times tokens, wgmma's accumulators; where it is interpreted, whose wgmma takes no registers, plain sums."""
            if interpret:

                def plain_step(_, carry):
                    count, *sums = carry
                    slot, rows = read(count)
                    plgpu.barrier_wait(converted.at[slot])
                    tokens = x_smem[slot].astype(jnp.float32)
                    for half, codes in enumerate(rows):
                        sums[half] += lax.dot_general(codes[...].astype(jnp.float32), tokens, (((1,), (1,)), ((), ())))
                    plgpu.barrier_arrive(emptied.at[slot])
                    return count + 1, *sums

                return lax.fori_loop(0, steps, plain_step, (count, *[jnp.zeros((HEIGHT, lanes), jnp.float32)] * halves))

            def accumulate(*sums):
                def step(_, count):
                    slot, rows = read(count)
                    for block in range(0, width, BLOCK):
                        codes = [plgpu.load(ref.at[:, pl.ds(block, BLOCK)], layout=plgpu.Layout.WGMMA_8BIT) for ref in rows]
                        for piece in range(0, BLOCK, _PIECE):
                            numbers = [_numbers(of_rows, piece // _PIECE) for of_rows in codes]
                            if block == piece == 0:
                                plgpu.barrier_wait(converted.at[slot])
                            tokens = x_smem.at[slot, :, pl.ds(block + piece, _PIECE)].transpose((1, 0))
                            for total, of_rows in zip(sums, numbers, strict=True):
                                plgpu.wgmma(total, of_rows, tokens)
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(emptied.at[slot])
                    return count + 1

                return lax.fori_loop(0, steps, step, count), *[total[...] for total in sums]

            return pl.run_scoped(accumulate, *[plgpu.WGMMAAccumulatorRef((HEIGHT, lanes), jnp.float32)] * halves)

        def compute_chunk(chunk, count):
            scales = scales_of(chunk)  # before the products, so that nothing waits for them
            count, *sums = sum_all(count)
            sums = [total * lax.broadcast_in_dim(scale * factor, total.shape, (0,)) for total, scale in zip(sums, scales, strict=True)]
            rest = sums[0] / (1 + jnp.exp(-sums[0])) * sums[1] if gated else sums[0]
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for plane in range(planes):
                part = rest.astype(dtype)
                out_smem.at[warpgroup, plane].transpose((1, 0))[...] = part
                if plane + 1 < planes:
                    rest = rest - part.astype(jnp.float32)
            plgpu.commit_smem()
            first, share, tokens = place(chunk)
            rows = pl.ds(pl.multiple_of((first + warpgroup) * HEIGHT, HEIGHT), HEIGHT)
            for plane in range(planes):
                plgpu.copy_smem_to_gmem(out_smem.at[warpgroup, plane], sums_ref.at[share * planes + plane, tokens, rows])
            return count

        lax.fori_loop(begin, end, compute_chunk, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)


def _numbers(codes: jax.Array, piece: int) -> jax.Array:
    """Numbers float16 [64, 32] of a part of a block's codes [64, 128], four that lie together as pairs 8 columns apart."""
    result = plgpu.ShapeDtypeStruct((HEIGHT, _PIECE), jnp.float16, layout=plgpu.Layout.WGMMA)
    word = functools.partial(ir.IntegerType.get_signless, 32)
    asm = eight_bit_half_asm(codes.dtype)

    # The second axis of the registers are tiles of 16 columns, then of 8.
    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA_8BIT,), return_type=result)
    def numbers(ctx, codes):
        del ctx
        tiles = codes.registers[:, 2 * piece : 2 * piece + 2]
        registers = np.empty((tiles.shape[0], 4, *tiles.shape[2:]), dtype=object)
        both = llvm.StructType.get_literal([word(), word()])
        pair = ir.VectorType.get((2,), ir.F16Type.get())
        for place, register in np.ndenumerate(tiles):
            two = llvm.inline_asm(both, [bitcast(register, word())], asm, "=r,=r,r")
            for half in range(2):
                registers[(place[0], 2 * place[1] + half, *place[2:])] = bitcast(llvm.extractvalue(word(), two, [half]), pair)
        return mgpu.FragmentedArray(_registers=registers, _layout=mgpu.WGMMA_LAYOUT, _is_signed=None)

    # The decorator takes the first argument, a context, away.
    return numbers(codes)  # pyright: ignore[reportCallIssue]
