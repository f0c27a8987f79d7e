"""Few tokens times a weight of 4 or 8 bits for sm_90 (Hopper), in Pallas Mosaic GPU: up to 64 as fast as the codes can be read.

As matmul/mosaic.py: a warpgroup fetches by TMA and runs ahead over the borders of tiles, the others compute. Each of those takes 64 rows
of the tile, makes its codes 16 bits wide in registers, in the very places where wgmma wants its left operand, and multiplies the float32
product of each group by the group's scale. Four codes of 8 bits that lie together are two pairs of wgmma's operand, 8 columns apart: the
tokens' columns are put into that order before.
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

from jaxserve.pallas_kernels.mosaic import BY_ROW, HEIGHT, empty_slot, even_workers, filled_slot, lane_semantics, see_out, swizzled
from jaxserve.pallas_kernels.quantized_matmul.upcast import addend_pair_asm, eight_bit_asm, four_bit_asm
from jaxserve.pallas_kernels.quantized_matmul.weights import BLOCK, EightBitWeight, FourBitWeight

MOST_LANES = 128  # tokens of a tile; more are cut into equal tiles
_PIECE = 32  # columns that are widened and multiplied at once


@dataclass(frozen=True)
class MosaicQuantizedConfig:
    """How the kernel is cut.

    Attributes:
        warpgroups: that compute; each has 64 rows of a tile. If gated an even number: half of them have gate rows, half up rows.
        splits: shares of the columns, each with partial sums of its own; 1 if gated.
        num_stages: fetches in flight.
        num_blocks: at most so many blocks of threads; each walks several tiles if there are more.
        width: blocks of 128 columns of a fetch.
    """

    warpgroups: int
    splits: int
    num_stages: int
    num_blocks: int
    width: int = 1


@functools.partial(jax.jit, static_argnames=("config", "gated", "interpret"))
def quantized_matmul_mosaic(
    x: jax.Array, weight: FourBitWeight | EightBitWeight, *, config: MosaicQuantizedConfig, gated: bool = False, interpret: bool = False
) -> jax.Array:
    """x [T, K], bfloat16 or float16, times the transposed weight [N, K] without minima, an EightBitWeight's zeros; no table but 0 to 15.

    N is a multiple of 64 * warpgroups, K of 128 * width * splits; x has as many columns. The same bits in every run.

    Returns:
        [P, T, N] in x's dtype, parts whose sum is the product: one, or two for each split, as matmul_mosaic's. Gated: silu(gate) * up,
        [1, T, N / 2], of the weight's gate rows and the up rows after them.
    """
    num_tokens, (size, depth) = x.shape[0], weight.shape
    lanes, tiles = token_tiles(num_tokens)
    blocks = depth // BLOCK
    heights, teams = size // HEIGHT, config.warpgroups
    chunks = heights // teams * config.splits * tiles
    workers = even_workers(chunks, config.num_blocks)
    planes = 1 if config.splits == 1 else 2
    halves, width = 2 if gated else 1, config.width
    zero = 0 if isinstance(weight, FourBitWeight) and weight.values else 8
    x = pad_tokens(x, lanes * tiles, interpret)
    if isinstance(weight, FourBitWeight):
        codes, zeros = weight.codes.reshape(blocks, heights, HEIGHT, _PIECE), weight.zeros
        tile, run = (halves, width, teams // halves, HEIGHT, _PIECE), _PIECE
    else:
        codes, zeros = weight.codes.reshape(heights, HEIGHT, depth), None
        if not interpret:
            x = x.reshape(-1, depth // 16, 4, 2, 2).swapaxes(2, 3).reshape(-1, depth)
        tile, run = (halves, teams // halves, HEIGHT, width * BLOCK), BLOCK
    groups = max(1, width * BLOCK // weight.group)
    # Of a gated product those of gate and up rows are fetched at once: of one half alone they may be too few bytes for a copy.
    scales = weight.scales.reshape(-1, halves, heights // halves, HEIGHT)
    zeros = None if zeros is None else zeros.reshape(-1, halves, heights // halves, HEIGHT)
    of_groups = functools.partial(plgpu.SMEM, (config.num_stages, groups, halves, teams // halves, HEIGHT))
    sums = plgpu.kernel(
        functools.partial(
            _quantized_matmul_kernel,
            config=config,
            group=weight.group,
            chunks=chunks,
            workers=workers,
            interpret=interpret,
        ),
        out_type=jax.ShapeDtypeStruct((config.splits * planes, x.shape[0], size // halves), x.dtype),
        scratch_types=(
            plgpu.SMEM((config.num_stages, *tile), codes.dtype, transforms=swizzled(run, codes.dtype)),
            plgpu.SMEM((config.num_stages, lanes, width * BLOCK), x.dtype, transforms=swizzled(_PIECE, x.dtype)),
            of_groups(scales.dtype),
            None if zeros is None else of_groups(zeros.dtype),
            plgpu.SMEM((teams // halves, planes, lanes, HEIGHT), x.dtype, transforms=swizzled(HEIGHT // 2, x.dtype)),
            plgpu.Barrier(num_arrivals=2 + halves + (zeros is not None), num_barriers=config.num_stages),
            plgpu.Barrier(num_arrivals=teams, num_barriers=config.num_stages),
            plgpu.Barrier(num_barriers=teams) if gated else None,
        ),
        grid=(workers,),
        grid_names=("worker",),
        num_threads=teams + 1,
        thread_name="warpgroup",
        compiler_params=lane_semantics(),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )(x, codes, scales, zeros, jnp.full((1,), zero, jnp.int32))
    return sums[:, :num_tokens]


def token_tiles(num_tokens: int) -> tuple[int, int]:
    """The tokens of a tile, a multiple of 8, and how many tiles hold them all."""
    tiles = pl.cdiv(num_tokens, MOST_LANES)
    return pl.cdiv(num_tokens, 8 * tiles) * 8, tiles


def pad_tokens(x: jax.Array, num_lanes: int, interpret: bool) -> jax.Array:
    """x [T, K] with zeros for as many tokens as all tiles hold; as it is where TMA gives zeros for those that lack.

    TMA does so, and writes none of them, where a tile is a whole unit of its swizzled memory, 8 tokens; the interpreter does not.
    """
    return x if x.shape[0] < num_lanes == 8 and not interpret else jnp.pad(x, ((0, num_lanes - x.shape[0]), (0, 0)))


def _quantized_matmul_kernel(
    x_ref, codes_ref, scales_ref, zeros_ref, one_zero_ref, sums_ref, codes_smem, x_smem, scales_smem, zeros_smem, out_smem, filled, emptied,
    handed_over, *, config: MosaicQuantizedConfig, group: int, chunks: int, workers: int, interpret: bool,
):  # fmt: skip
    teams, splits, planes = config.warpgroups, jnp.int32(config.splits), out_smem.shape[1]
    depth, lanes = x_ref.shape[1], x_smem.shape[1]
    tiles = jnp.int32(pl.cdiv(x_ref.shape[0], lanes))
    four_bit = codes_ref.dtype == jnp.uint16
    width, groups_a_step = config.width, scales_smem.shape[1]
    parts = max(1, BLOCK // group)  # of a block, which have a scale each
    gated = handed_over is not None
    pairs = teams // 2 if gated else teams  # whose rows are next to each other
    units = sums_ref.shape[2] // HEIGHT
    steps = depth // (width * BLOCK) // config.splits
    worker = lax.axis_index("worker")
    warpgroup = lax.axis_index("warpgroup")

    def place(chunk):
        """A chunk's first row in units of a tile's, its share of the columns, its tile of tokens; what shares codes is neighbours."""
        rest = lax.div(chunk, tiles)
        return lax.div(rest, splits) * pairs, lax.rem(rest, splits), pl.ds(lax.rem(chunk, tiles) * lanes, lanes)

    begin, end = lax.div(worker * chunks, jnp.int32(workers)), lax.div((worker + 1) * chunks, jnp.int32(workers))

    @pl.when(warpgroup == teams)
    def _fetch():
        def fetch_chunk(chunk, count):
            first, share, tokens = place(chunk)

            def step(i, count):
                slot = empty_slot(emptied, count)
                # Blocks of threads start at different columns: together at the same ones they would crowd some of the memory's channels.
                block = (share * steps + lax.rem(i + worker, jnp.int32(steps))) * width
                columns = pl.ds(pl.multiple_of(block * BLOCK, BLOCK), width * BLOCK)
                plgpu.copy_gmem_to_smem(x_ref.at[tokens, columns], x_smem.at[slot], filled.at[slot])
                groups = pl.ds(block * parts if group <= BLOCK else lax.div(block * BLOCK, jnp.int32(group)), groups_a_step)
                for half in range(teams // pairs):
                    heights = pl.ds(first + half * units, pairs)
                    codes = codes_ref.at[pl.ds(block, width), heights] if four_bit else codes_ref.at[heights, :, columns]
                    plgpu.copy_gmem_to_smem(codes, codes_smem.at[slot, half], filled.at[slot])
                heights = pl.ds(first, pairs)
                for ref, smem in ((scales_ref, scales_smem), (zeros_ref, zeros_smem)):
                    if ref is not None:
                        plgpu.copy_gmem_to_smem(ref.at[groups, :, heights], smem.at[slot], filled.at[slot])
                return count + 1

            return lax.fori_loop(0, steps, step, count)

        count = lax.fori_loop(begin, end, fetch_chunk, jnp.int32(0))
        see_out(emptied, count)

    @pl.when(warpgroup < teams)
    def _compute():
        one_zero = plgpu.layout_cast(lax.broadcast_in_dim(one_zero_ref[0], (HEIGHT,), ()), BY_ROW)
        half, pair = (lax.div(warpgroup, jnp.int32(pairs)), lax.rem(warpgroup, jnp.int32(pairs))) if gated else (0, warpgroup)

        def of_rows(smem, slot, block, part):
            """What the rows have in smem, a scale or a zero each, for a group of a block."""
            return plgpu.load(smem.at[slot, block * parts + part if group <= BLOCK else block * BLOCK // group, half, pair], layout=BY_ROW)

        def multiply(sums, slot, block, part, codes):
            """Adds a group's product to sums, wgmma's accumulator; in the interpreter returns it, whose wgmma takes no registers."""
            products = []
            for piece in range(part * 4 // parts, (part + 1) * 4 // parts):
                zeros = one_zero if zeros_ref is None else of_rows(zeros_smem, slot, block, part).astype(jnp.int32)
                numbers = _numbers(codes, piece, zeros, x_ref.dtype, interpret)
                tokens = x_smem.at[slot, :, pl.ds(block * BLOCK + piece * _PIECE, _PIECE)]
                if interpret:
                    operands = numbers.astype(jnp.float32), tokens[...].astype(jnp.float32)
                    products.append(lax.dot_general(*operands, (((1,), (1,)), ((), ()))))
                else:
                    plgpu.wgmma(sums, numbers, tokens.transpose((1, 0)))
            if interpret:
                return sum(products)
            plgpu.wgmma_wait(0)
            return None

        def in_accumulator(body):
            return pl.run_scoped(body, plgpu.WGMMAAccumulatorRef((HEIGHT, lanes), jnp.float32))

        def read(slot, block):
            if four_bit:
                return plgpu.load(codes_smem.at[slot, half, block, pair], layout=plgpu.Layout.WGMMA)
            return plgpu.load(codes_smem.at[slot, half, pair, :, pl.ds(block * BLOCK, BLOCK)], layout=plgpu.Layout.WGMMA_8BIT)

        def across(scales):
            return lax.broadcast_in_dim(scales.astype(jnp.float32), (HEIGHT, lanes), (0,))

        def sum_by_groups(count):
            def step(i, carry):
                del i
                count, total = carry
                slot = filled_slot(filled, count)
                for block in range(width):
                    codes = read(slot, block)
                    scales = [of_rows(scales_smem, slot, block, part) for part in range(parts)]  # asked for before the products
                    for part in range(parts):

                        def product(sums, slot=slot, block=block, part=part, codes=codes):
                            multiply(sums, slot, block, part, codes)
                            return sums[...]

                        sums = multiply(None, slot, block, part, codes) if interpret else in_accumulator(product)
                        assert sums is not None
                        total = total + sums * across(scales[part])
                plgpu.barrier_arrive(emptied.at[slot])
                return count + 1, total

            total = plgpu.layout_cast(jnp.zeros((HEIGHT, lanes), jnp.float32), plgpu.Layout.WGMMA)
            return lax.fori_loop(0, steps, step, (count, total))

        def compute_chunk(chunk, count):
            count, total = sum_by_groups(count)
            (store_gated if gated else store)(chunk, total)
            return count

        def store(chunk, rest):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for plane in range(planes):
                part = rest.astype(sums_ref.dtype)
                out_smem.at[warpgroup, plane].transpose((1, 0))[...] = part
                if plane + 1 < planes:
                    rest = rest - part.astype(jnp.float32)
            plgpu.commit_smem()
            first, share, tokens = place(chunk)
            row = (first + warpgroup) * HEIGHT
            for plane in range(planes):
                rows = pl.ds(pl.multiple_of(row, HEIGHT), HEIGHT)
                plgpu.copy_smem_to_gmem(out_smem.at[warpgroup, plane], sums_ref.at[share * planes + plane, tokens, rows])

        def store_gated(chunk, total):
            """A warpgroup with up rows hands them over in SMEM, rounded, and goes on; that with their gate rows multiplies."""
            given, taken = handed_over.at[2 * pair], handed_over.at[2 * pair + 1]
            buffer = out_smem.at[pair, 0]

            @pl.when(warpgroup >= pairs)
            def _give():
                @pl.when(chunk > begin)
                def _():
                    plgpu.barrier_wait(taken)

                buffer.transpose((1, 0))[...] = total.astype(sums_ref.dtype)
                plgpu.barrier_arrive(given)

            @pl.when(warpgroup < pairs)
            def _take():
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

                @pl.when(chunk > begin)
                def _():
                    plgpu.barrier_arrive(taken)

                first, tokens = place(chunk)[::2]
                plgpu.barrier_wait(given)
                up = plgpu.load(buffer.transpose((1, 0)), layout=plgpu.Layout.WGMMA, optimized=False).astype(jnp.float32)
                buffer.transpose((1, 0))[...] = (total / (1 + jnp.exp(-total)) * up).astype(sums_ref.dtype)
                plgpu.commit_smem()
                rows = pl.ds(pl.multiple_of((first + pair) * HEIGHT, HEIGHT), HEIGHT)
                plgpu.copy_smem_to_gmem(buffer, sums_ref.at[0, tokens, rows])

        lax.fori_loop(begin, end, compute_chunk, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)


def _numbers(codes: jax.Array, piece: int, zeros: jax.Array, dtype: jnp.dtype, interpret: bool) -> jax.Array:
    """Numbers [64, 32] in dtype of a block's codes, uint16 [64, 32] less their zeros, int32 [64], or of 8 bits [64, 128]."""
    codes_dtype, four_bit = codes.dtype, codes.dtype == jnp.uint16
    if interpret:
        if not four_bit:
            return codes[:, piece * _PIECE : (piece + 1) * _PIECE].astype(dtype)
        numbers = (codes >> jnp.uint16(4 * piece)) & jnp.uint16(15)
        return numbers.astype(dtype) - lax.broadcast_in_dim(zeros.astype(dtype), numbers.shape, (0,))
    result = plgpu.ShapeDtypeStruct((HEIGHT, _PIECE), dtype, layout=plgpu.Layout.WGMMA)
    word = functools.partial(ir.IntegerType.get_signless, 32)

    def pairs():
        return ir.VectorType.get((2,), ir.BF16Type.get() if dtype == jnp.bfloat16 else ir.F16Type.get())

    # The second axis of the registers are tiles of 8 columns (16, if of 8 bits), the fifth the upper and the lower 8 rows.
    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, BY_ROW), return_type=result)
    def four_bit_numbers(ctx, codes, zeros):
        del ctx
        added = [llvm.inline_asm(word(), [bitcast(zero, word())], addend_pair_asm(dtype), "=r,r") for zero in zeros.registers.flat]
        registers = np.empty_like(codes.registers)
        for place, register in np.ndenumerate(codes.registers):
            operands = [bitcast(register, word()), added[place[4]]]
            registers[place] = bitcast(llvm.inline_asm(word(), operands, four_bit_asm(piece, dtype), "=r,r,r"), pairs())
        return mgpu.FragmentedArray(_registers=registers, _layout=mgpu.WGMMA_LAYOUT, _is_signed=None)

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA_8BIT,), return_type=result)
    def eight_bit_numbers(ctx, codes):
        del ctx
        tiles = codes.registers[:, 2 * piece : 2 * piece + 2]
        registers = np.empty((tiles.shape[0], 4, *tiles.shape[2:]), dtype=object)
        both = llvm.StructType.get_literal([word(), word()])
        for place, register in np.ndenumerate(tiles):
            halves = llvm.inline_asm(both, [bitcast(register, word())], eight_bit_asm(codes_dtype, dtype), "=r,=r,r")
            for half in range(2):
                registers[(place[0], 2 * place[1] + half, *place[2:])] = bitcast(llvm.extractvalue(word(), halves, [half]), pairs())
        return mgpu.FragmentedArray(_registers=registers, _layout=mgpu.WGMMA_LAYOUT, _is_signed=None)

    # The decorator takes the first argument, a context, away.
    # The decorator takes the first argument, a context, away.
    return four_bit_numbers(codes, zeros) if four_bit else eight_bit_numbers(codes)  # pyright: ignore[reportCallIssue]
