"""1 to 16 tokens times a weight of 4 bits for sm_90 (Hopper), in Pallas Mosaic GPU: the tensor cores take the codes nearly as they lie.

As mosaic_eight_bit.py: a warpgroup fetches by TMA and runs ahead over the borders of tiles, one makes the tokens float16 in SMEM, others
compute. A code alone in 16 bits is a subnormal float16, code * 2^-24, and the second code of a byte where it lies is 16 times that: so one
AND makes two numbers, exactly, and nothing is shifted but the upper byte of a word. mma.sync multiplies them, 16 rows a warp, with a chain
of sums for the codes and one for those that count 16 times, which do not wait for each other. Zeros are taken from a group's sums, as the
zero times the sum of a token's columns, which the converting warpgroup adds up on its way.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.mosaic.gpu.utils import bitcast
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm

from jaxserve.pallas_kernels.mosaic import (
    BY_ROW,
    HEIGHT,
    empty_slot,
    even_workers,
    filled_slot,
    lane_semantics,
    see_out,
    swizzled,
)
from jaxserve.pallas_kernels.quantized_matmul.half_tokens import HALF_FACTOR, TILE_BYTES, halves_and_sums
from jaxserve.pallas_kernels.quantized_matmul.mosaic import pad_tokens
from jaxserve.pallas_kernels.quantized_matmul.weights import BLOCK, FourBitWeight

MOST_LANES = 16
_PIECE = 32  # columns of a plane: a word has one code of each of four
_LANES = 8  # tokens of an mma
_CODE_UNIT = 2.0**-24  # what float16's lowest bit counts
_FETCH_REGISTERS, _CONVERT_REGISTERS = 32, 32
_BY_LANE = plgpu.Layout.WGMMA.reduce(0)


@dataclass(frozen=True)
class MosaicFourBitConfig:
    """How the kernel is cut.

    Attributes:
        teams: of warpgroups that compute, with rows of their own.
        shares: warpgroups of a team, which take fetches in turns; num_stages and the fetches of a tile are multiples of it.
        heights: units of 64 rows of a team; 2 if gated, the gate and the up rows of the same units.
        splits: shares of the columns, each with partial sums of its own; 1 if gated.
        width: blocks of 128 columns of a fetch.
        num_stages: fetches in flight.
        num_blocks: at most so many blocks of threads; each walks several tiles if there are more.
    """

    teams: int
    shares: int
    heights: int
    splits: int
    width: int
    num_stages: int
    num_blocks: int


@functools.partial(jax.jit, static_argnames=("config", "gated", "interpret"))
def four_bit_matmul_mosaic(
    x: jax.Array, weight: FourBitWeight, *, config: MosaicFourBitConfig, gated: bool = False, interpret: bool = False
) -> jax.Array:
    """x [T, K], bfloat16 or float16, T at most 16, times the transposed weight [N, K] without minima; no table but 0 to 15.

    bfloat16 tokens are rounded to float16 as `eight_bit_matmul_mosaic` rounds them. N is a multiple of 64 * teams * heights, K of
    128 * width * shares * splits; x has as many columns. The same bits in every run.

    Returns:
        [P, T, N] in x's dtype, parts whose sum is the product: one, or two for each split, as matmul_mosaic's. Gated: silu(gate) * up,
        [1, T, N / 2], of the weight's gate rows and the up rows after them.
    """
    (num_tokens, dtype), (size, depth) = (x.shape[0], x.dtype), weight.shape
    teams, width, stages = config.teams, config.width, config.num_stages
    lanes, blocks, units = pl.cdiv(num_tokens, _LANES) * _LANES, depth // BLOCK, size // HEIGHT
    chunks = units // (teams * config.heights) * config.splits
    workers = even_workers(chunks, config.num_blocks)
    planes = 1 if config.splits == 1 else 2
    # What is fetched at once: rows that lie together, of a gated product twice as many.
    halves, together = (2, teams) if gated else (1, teams * config.heights)
    parts = max(1, BLOCK // weight.group)
    x = pad_tokens(x, lanes, interpret)
    factor = 1.0 if dtype == jnp.float16 else HALF_FACTOR
    if interpret:
        x = (x.astype(jnp.float32) / factor).astype(jnp.float16)
    of_groups = functools.partial(plgpu.SMEM, (stages, width * parts, halves, together, HEIGHT))
    scales = weight.scales.reshape(-1, halves, units // halves, HEIGHT)
    zeros = None if weight.zeros is None else weight.zeros.reshape(-1, halves, units // halves, HEIGHT)
    outs = teams * (1 if gated else config.heights)
    sums = plgpu.kernel(
        functools.partial(
            _four_bit_kernel,
            config=config,
            one_zero=0 if weight.values else 8,
            parts=parts,
            factor=factor,
            chunks=chunks,
            workers=workers,
            dtype=dtype,
            interpret=interpret,
        ),
        out_type=jax.ShapeDtypeStruct((config.splits * planes, x.shape[0], size // halves), dtype),
        scratch_types=(
            plgpu.SMEM((stages, halves, width, together, HEIGHT, _PIECE), jnp.uint16, transforms=swizzled(_PIECE, jnp.uint16)),
            plgpu.SMEM((stages, lanes, width * BLOCK), jnp.float16, transforms=swizzled(_PIECE, jnp.float16)),
            plgpu.SMEM((stages, width * parts, lanes), jnp.float32),
            of_groups(scales.dtype),
            None if zeros is None else of_groups(zeros.dtype),
            plgpu.SMEM((outs, planes, lanes, HEIGHT), dtype, transforms=swizzled(HEIGHT // 2, dtype)),
            plgpu.Barrier(num_arrivals=2 + halves + (zeros is not None), num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_arrivals=teams, num_barriers=stages),
            None if config.shares == 1 else plgpu.SMEM((config.shares - 1, teams, config.heights, HEIGHT, lanes), jnp.float32),
            None if config.shares == 1 else plgpu.Barrier(num_barriers=2 * teams * (config.shares - 1)),
        ),
        grid=(workers,),
        grid_names=("worker",),
        num_threads=teams * config.shares + 2,
        thread_name="warpgroup",
        compiler_params=lane_semantics(),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )(
        # Tokens are fetched as they are: their bits alone are float16's until they are converted.
        lax.bitcast_convert_type(x, jnp.float16),
        weight.codes.reshape(blocks, units, HEIGHT, _PIECE),
        scales,
        zeros,
    )
    return sums[:, :num_tokens]


def _four_bit_kernel(
    x_ref, codes_ref, scales_ref, zeros_ref, sums_ref, codes_smem, x_smem, x_sums_smem, scales_smem, zeros_smem, out_smem,
    filled, converted, emptied, given_smem, given, *, config: MosaicFourBitConfig, one_zero: int, parts: int, factor: float, chunks: int,
    workers: int, dtype, interpret: bool,
):  # fmt: skip
    teams, shares, splits, width = config.teams, config.shares, jnp.int32(config.splits), config.width
    computing = teams * shares
    halves, together = scales_smem.shape[2:4]
    gated = halves == 2
    planes, lanes = out_smem.shape[1:3]
    steps = codes_ref.shape[0] // width // config.splits
    worker = lax.axis_index("worker")
    warpgroup = lax.axis_index("warpgroup")
    begin, end = lax.div(worker * chunks, jnp.int32(workers)), lax.div((worker + 1) * chunks, jnp.int32(workers))

    def place(chunk):
        """A chunk's first row in units of 64, and its share of the columns; what shares tokens is far apart, what shares rows near."""
        return lax.div(chunk, splits) * together, lax.rem(chunk, splits)

    @pl.when(warpgroup == computing)
    def _fetch():
        plgpu.set_max_registers(_FETCH_REGISTERS, action="decrease")

        def fetch_chunk(chunk, count):
            first, share = place(chunk)

            def step(i, count):
                slot = empty_slot(emptied, count)
                # Blocks of threads start at different columns: together at the same ones they would crowd some of the memory's channels.
                block = (share * steps + lax.rem(i + worker, jnp.int32(steps))) * width
                columns = pl.ds(pl.multiple_of(block * BLOCK, BLOCK), width * BLOCK)
                plgpu.copy_gmem_to_smem(x_ref.at[pl.ds(0, lanes), columns], x_smem.at[slot], filled.at[slot])
                for half in range(halves):
                    rows = codes_ref.at[pl.ds(block, width), pl.ds(first + half * scales_ref.shape[2], together)]
                    plgpu.copy_gmem_to_smem(rows, codes_smem.at[slot, half], filled.at[slot])
                for ref, smem in ((scales_ref, scales_smem), (zeros_ref, zeros_smem)):
                    if ref is not None:
                        of_rows = ref.at[pl.ds(block * parts, width * parts), :, pl.ds(first, together)]
                        plgpu.copy_gmem_to_smem(of_rows, smem.at[slot], filled.at[slot])
                return count + 1

            return lax.fori_loop(0, steps, step, count)

        count = lax.fori_loop(begin, end, fetch_chunk, jnp.int32(0))
        see_out(emptied, count)

    @pl.when(warpgroup == computing + 1)
    def _convert():
        plgpu.set_max_registers(_CONVERT_REGISTERS, action="decrease")
        unit = -_CODE_UNIT * (one_zero if zeros_ref is None else 1)

        def step(count, carry):
            slot = filled_slot(filled, count)
            if not interpret:
                halves_and_sums(x_smem.at[slot], x_sums_smem.at[slot], unit, parts, dtype)
                plgpu.commit_smem()
            plgpu.barrier_arrive(converted.at[slot])
            return carry

        lax.fori_loop(0, (end - begin) * steps, step, jnp.int32(0))

    @pl.when(warpgroup < computing)
    def _compute():
        # Of what the block was started with: more would be waited for forever.
        registers = 512 // (computing + 2) // 8 * 8 * (computing + 2) - _FETCH_REGISTERS - _CONVERT_REGISTERS
        plgpu.set_max_registers(min(240, registers // computing // 8 * 8), action="increase")
        team, turn = (
            (warpgroup, jnp.int32(0)) if shares == 1 else (lax.rem(warpgroup, jnp.int32(teams)), lax.div(warpgroup, jnp.int32(teams)))
        )
        # Which of the rows that are fetched at once each height has.
        own = [(half, team) for half in range(halves)] if gated else [(0, team * config.heights + i) for i in range(config.heights)]

        def of_rows(smem, slot, group, at):
            """What a height's rows have in smem, a scale or a zero each, in float32."""
            return plgpu.load(smem.at[slot, group, *at], layout=BY_ROW).astype(jnp.float32)

        def across(values):
            return lax.broadcast_in_dim(values, (HEIGHT, lanes), (0,))

        def plain_sums(slot, block, part, at):
            """A group's sums as the interpreter can form them."""
            codes = codes_smem[slot, at[0], block, at[1]]
            sums = jnp.zeros((HEIGHT, lanes), jnp.float32)
            for plane in range(part * 4 // parts, (part + 1) * 4 // parts):
                numbers = ((codes >> jnp.uint16(4 * plane)) & jnp.uint16(15)).astype(jnp.float32)
                numbers -= one_zero if zeros_ref is None else across_columns(of_rows(zeros_smem, slot, block * parts + part, at))
                tokens = x_smem[slot, :, pl.ds(block * BLOCK + plane * _PIECE, _PIECE)].astype(jnp.float32)
                sums += lax.dot_general(numbers, tokens, (((1,), (1,)), ((), ())))
            return sums * _CODE_UNIT

        def across_columns(values):
            return lax.broadcast_in_dim(values, (HEIGHT, _PIECE), (0,))

        def first_sums(slot, group, at):
            """Less a group's zeros times its tokens' sums: what products are added to."""
            less = plgpu.load(x_sums_smem.at[slot, group], layout=_BY_LANE, optimized=False)
            less = lax.broadcast_in_dim(less, (HEIGHT, lanes), (1,))
            return less if zeros_ref is None else less * across(of_rows(zeros_smem, slot, group, at))

        def read(slot, block):
            return [plgpu.load(codes_smem.at[slot, half, block, unit], layout=plgpu.Layout.WGMMA) for half, unit in own]

        def step(i, carry):
            count, *totals = carry
            slot = filled_slot(filled, count + i * shares + turn)
            codes = [] if interpret else read(slot, 0)
            plgpu.barrier_wait(converted.at[slot])
            for block in range(width):
                groups = range(block * parts, (block + 1) * parts)
                if interpret:
                    sums = [[plain_sums(slot, block, part, at) for part in range(parts)] for at in own]
                else:
                    first = [[first_sums(slot, group, at) for group in groups] for at in own]
                    sums = _sums_of_groups(codes if block == 0 else read(slot, block), x_smem.at[slot], block, first)
                for i, at in enumerate(own):
                    for group, of_group in zip(groups, sums[i], strict=True):
                        totals[i] += of_group * across(of_rows(scales_smem, slot, group, at))
            plgpu.barrier_arrive(emptied.at[slot])
            return count, *totals

        def barriers(which):
            """Of what the team's warpgroup of a turn gives to its first: that it is there, and that it was taken."""
            number = 2 * ((which - 1) * teams + team)
            return given.at[number], given.at[number + 1]

        def give(chunk, totals):
            there, taken = barriers(turn)

            @pl.when(chunk > begin)
            def _():
                plgpu.barrier_wait(taken)

            for i, total in enumerate(totals):
                given_smem.at[turn - 1, team, i][...] = total
            plgpu.barrier_arrive(there)

        def take(chunk, totals):
            for which in range(1, shares):
                there, taken = barriers(which)

                @pl.when(chunk > begin)
                def _(taken=taken):
                    plgpu.barrier_arrive(taken)

                plgpu.barrier_wait(there)
                others = [given_smem.at[which - 1, team, i] for i in range(len(totals))]
                others = [plgpu.load(ref, layout=plgpu.Layout.WGMMA, optimized=False) for ref in others]
                totals = [total + other for total, other in zip(totals, others, strict=True)]
            return totals

        def store(rest, buffer, share, row):
            """Sums [64, lanes] to a plane, and what it lacks to the next one if there is one."""
            for plane in range(planes):
                part = rest.astype(dtype)
                out_smem.at[buffer, plane].transpose((1, 0))[...] = part
                if plane + 1 < planes:
                    rest = rest - part.astype(jnp.float32)
            plgpu.commit_smem()
            rows = pl.ds(pl.multiple_of(row * HEIGHT, HEIGHT), HEIGHT)
            for plane in range(planes):
                plgpu.copy_smem_to_gmem(out_smem.at[buffer, plane], sums_ref.at[share * planes + plane, pl.ds(0, lanes), rows])

        def finish(chunk, totals):
            totals = [total * (factor / _CODE_UNIT) for total in take(chunk, totals)]
            first, share = place(chunk)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            if gated:
                gate, up = totals
                store(gate / (1 + jnp.exp(-gate)) * up, team, 0, first + team)
            else:
                for (_, unit), total in zip(own, totals, strict=True):
                    store(total, unit, share, first + unit)

        def compute_chunk(chunk, count):
            zero = plgpu.layout_cast(jnp.zeros((HEIGHT, lanes), jnp.float32), plgpu.Layout.WGMMA)
            _, *totals = lax.fori_loop(0, steps // shares, step, (count, *[zero] * len(own)))
            if shares == 1:
                finish(chunk, totals)
            else:
                pl.when(turn == 0)(lambda: finish(chunk, totals))
                pl.when(turn > 0)(lambda: give(chunk, totals))
            return count + steps

        lax.fori_loop(begin, end, compute_chunk, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)


# Codes in a 32-bit word's two lanes that are neighbours in a plane; planes 2 and 3 are in the upper bytes.
_MASKS = "0x000f000f", "0x00f000f0"
_MMA = (
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};",
    "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
)


def _sums_of_groups(codes: list, x_ref, block: int, first: list[list]) -> list[list]:
    """A block's products, float32 [64, lanes] in wgmma's layout: a list for each height of its groups' sums, as `first` has the addends.

    Args:
        codes: for each height the words, uint16 [64, 32].
        x_ref: tokens in SMEM, float16 [lanes, C].
        block: of 128 of its columns.
        first: what the sums begin with, in units of 2^-24.
    """
    parts, lanes, columns = len(first[0]), *x_ref.shape
    layouts = [plgpu.Layout.WGMMA] * len(codes), plgpu.RefType(swizzled(_PIECE, jnp.float16)), [[plgpu.Layout.WGMMA] * parts] * len(codes)
    result = [[plgpu.ShapeDtypeStruct((HEIGHT, lanes), jnp.float32, layout=plgpu.Layout.WGMMA)] * parts] * len(codes)

    @plgpu.inline_mgpu(arg_types=layouts, return_type=result)
    def products(ctx, codes, x_ref, first):
        del ctx
        word, single = ir.IntegerType.get_signless(32), ir.F32Type.get()
        words = [[bitcast(register, word) for register in of_height.registers.flat] for of_height in codes]
        uppers = [[llvm.lshr(x, mgpu_utils.c(8, word)) for x in of_height] for of_height in words]
        tokens_of = _token_operands(x_ref)
        zero = mgpu_utils.c(0.0, single)
        # Sums of a height, a group, eight tokens: those of the codes in the lower and those in the upper half of a byte.
        sums: dict[tuple[int, int, int], list] = {}
        for height, of_height in enumerate(first):
            for part, addends in enumerate(of_height):
                of_tokens = addends.registers.reshape(lanes // _LANES, 2)
                for n, pairs in enumerate(of_tokens):
                    sums[height, part, n] = [
                        [llvm.extractelement(pair, mgpu_utils.c(i, word)) for pair in pairs for i in range(2)],
                        [zero] * 4,
                    ]
        for plane in range(BLOCK // _PIECE):
            part = plane * parts // 4
            tile = (block * BLOCK) // _PIECE + plane
            tokens = [tokens_of(n * columns // _PIECE + tile) for n in range(lanes // _LANES)]
            for step in range(2):  # of 16 columns
                for height in range(len(codes)):
                    source = (words, uppers)[plane // 2][height][4 * step : 4 * step + 4]
                    masked = [llvm.inline_asm(word, [x], f"and.b32 $0, $1, {_MASKS[plane % 2]};", "=r,r") for x in source]
                    for n in range(lanes // _LANES):
                        chains = sums[height, part, n]
                        chains[plane % 2] = _mma(masked, tokens[n][2 * step : 2 * step + 2], chains[plane % 2])
        return [
            [_whole([_joined(sums[height, part, n]) for n in range(lanes // _LANES)], addends) for part, addends in enumerate(of_height)]
            for height, of_height in enumerate(first)
        ]

    # The decorator takes the first argument, a context, away.
    return products(codes, x_ref, first)  # pyright: ignore[reportCallIssue]


def _mma(codes: list, tokens: list, sums: list) -> list:
    """sums, four float32 a thread, plus 16 rows' codes times 8 tokens."""
    single = ir.F32Type.get()
    result = llvm.inline_asm(llvm.StructType.get_literal([single] * 4), [*codes, *tokens, *sums], *_MMA)
    return [llvm.extractvalue(single, result, [i]) for i in range(4)]


def _joined(chains: list[list]) -> list:
    """Both chains' sums, of which the second counts 16 times."""
    sixteenth = mgpu_utils.c(1 / 16, ir.F32Type.get())
    return [llvm.intr_fma(upper, sixteenth, lower) for lower, upper in zip(*chains, strict=True)]


def _whole(sums: list[list], like: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
    """The array [64, lanes] of each eight tokens' four sums, laid out as another."""
    pair, word = ir.VectorType.get((2,), ir.F32Type.get()), ir.IntegerType.get_signless(32)
    registers = np.empty((len(sums), 2), dtype=object)
    for place in np.ndindex(*registers.shape):
        vector = llvm.mlir_undef(pair)
        for i in range(2):
            vector = llvm.insertelement(vector, sums[place[0]][2 * place[1] + i], mgpu_utils.c(i, word))
        registers[place] = vector
    return mgpu.FragmentedArray(_registers=registers.reshape(like.registers.shape), _layout=like.layout, _is_signed=None)


def _token_operands(x_ref):
    """A function that reads mma's right operands of 8 tokens and 32 columns, a tile of x_ref: four words, two for each 16 columns."""
    word, byte = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(8)
    constant = functools.partial(mgpu_utils.c, ty=word)
    # A lane of a warp names a row of one of four matrices of 8 tokens and 8 columns; the swizzle moves those within 64 bytes.
    lane = arith.andi(mgpu_utils.thread_idx(), constant(31))
    token, matrix = arith.andi(lane, constant(7)), arith.shrui(lane, constant(3))
    swizzled_matrix = arith.xori(matrix, arith.shrui(token, constant(1)))
    own = arith.addi(arith.shli(token, constant(6)), arith.shli(swizzled_matrix, constant(4)))
    shared = llvm.PointerType.get(3)
    base = llvm.getelementptr(shared, mgpu_utils.memref_ptr(x_ref), [own], [-(2**31)], byte, None)

    def read(tile: int) -> list:
        at = llvm.getelementptr(shared, base, [], [tile * TILE_BYTES], byte, None)
        shape = ir.Attribute.parse("#nvvm.ld_st_matrix_shape<m=8, n=8>")
        words = nvvm.ldmatrix(at, layout=nvvm.MMALayout.row, num=4, shape=shape, elt_type=nvvm.LdStMatrixEltType.B16)
        return [llvm.extractvalue(word, words, [i]) for i in range(4)]

    return read
