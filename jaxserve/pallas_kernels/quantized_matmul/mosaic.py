"""Few tokens times a weight of 4 bits for sm_90 (Hopper), in Pallas Mosaic GPU: as fast as the codes can be read.

As matmul/mosaic.py: a warpgroup fetches by TMA and runs ahead over the borders of tiles, the others compute. Each of those takes 64 rows
of the tile, makes its codes 16 bits wide in registers, in the very places where wgmma wants its left operand, and multiplies the float32
product of each group by the group's scale.
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

from jaxserve.pallas_kernels.paged_attention.mosaic_decode import swizzled
from jaxserve.pallas_kernels.quantized_matmul.upcast import four_bit_asm
from jaxserve.pallas_kernels.quantized_matmul.weights import BLOCK, FourBitWeight

HEIGHT = 64  # of a wgmma


@dataclass(frozen=True)
class MosaicQuantizedConfig:
    """How the kernel is cut.

    Attributes:
        warpgroups: that compute; each has 64 rows of a tile.
        splits: shares of the columns, each with partial sums of its own.
        num_stages: blocks of 128 columns in flight.
        num_blocks: at most so many blocks of threads; each walks several tiles if there are more.
    """

    warpgroups: int
    splits: int
    num_stages: int
    num_blocks: int


@functools.partial(jax.jit, static_argnames=("config", "interpret"))
def quantized_matmul_mosaic(x: jax.Array, weight: FourBitWeight, *, config: MosaicQuantizedConfig, interpret: bool = False) -> jax.Array:
    """x [T, K], bfloat16 or float16, times the transposed weight [N, K]; the same bits in every run.

    The weight has neither zeros nor minima nor values; N is a multiple of 64 * warpgroups, K / 128 of splits.

    Returns:
        [P, T, N] in x's dtype, parts whose sum is the product: one, or two for each split, as matmul_mosaic's.
    """
    num_tokens, size = x.shape[0], weight.shape[0]
    lanes = pl.cdiv(num_tokens, 8) * 8
    blocks = weight.codes.shape[0]
    parts = BLOCK // weight.group
    heights, teams = size // HEIGHT, config.warpgroups
    chunks = heights // teams * config.splits
    workers = pl.cdiv(chunks, pl.cdiv(chunks, config.num_blocks))
    planes = 1 if config.splits == 1 else 2
    sums = plgpu.kernel(
        functools.partial(_quantized_matmul_kernel, config=config, parts=parts, chunks=chunks, workers=workers, interpret=interpret),
        out_type=jax.ShapeDtypeStruct((config.splits * planes, lanes, size), x.dtype),
        scratch_types=(
            plgpu.SMEM((config.num_stages, teams, HEIGHT, BLOCK // 4), jnp.uint16, transforms=swizzled(BLOCK // 4, jnp.uint16)),
            plgpu.SMEM((config.num_stages, lanes, BLOCK), x.dtype, transforms=swizzled(BLOCK // parts, x.dtype)),
            plgpu.SMEM((config.num_stages, parts, teams, HEIGHT), weight.scales.dtype),
            plgpu.SMEM((teams, planes, lanes, HEIGHT), x.dtype, transforms=swizzled(HEIGHT // 2, x.dtype)),
            plgpu.Barrier(num_arrivals=3, num_barriers=config.num_stages),
            plgpu.Barrier(num_arrivals=teams, num_barriers=config.num_stages),
        ),
        grid=(workers,),
        grid_names=("worker",),
        num_threads=teams + 1,
        thread_name="warpgroup",
        # Lane semantics lower in half the time of the default's, which infers layouts first.
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )(
        jnp.pad(x, ((0, lanes - num_tokens), (0, 0))),
        weight.codes.reshape(blocks, heights, HEIGHT, BLOCK // 4),
        weight.scales.reshape(blocks * parts, heights, HEIGHT),
    )
    return sums[:, :num_tokens]


def _quantized_matmul_kernel(
    x_ref, codes_ref, scales_ref, sums_ref, codes_smem, x_smem, scales_smem, out_smem, filled, emptied,
    *, config: MosaicQuantizedConfig, parts: int, chunks: int, workers: int, interpret: bool,
):  # fmt: skip
    teams, stages, splits, planes = config.warpgroups, config.num_stages, jnp.int32(config.splits), out_smem.shape[1]
    lanes = x_ref.shape[0]
    steps = codes_ref.shape[0] // config.splits
    width = BLOCK // parts
    worker = lax.axis_index("worker")
    warpgroup = lax.axis_index("warpgroup")
    begin, end = lax.div(worker * chunks, jnp.int32(workers)), lax.div((worker + 1) * chunks, jnp.int32(workers))

    @pl.when(warpgroup == teams)
    def _fetch():
        def fetch_chunk(chunk, count):
            heights = pl.ds(lax.div(chunk, splits) * teams, teams)

            def step(i, count):
                slot = lax.rem(count, jnp.int32(stages))

                @pl.when(count >= stages)
                def _():
                    plgpu.barrier_wait(emptied.at[slot])

                # Blocks of threads start at different columns: together at the same ones they would crowd some of the memory's channels.
                block = lax.rem(chunk, splits) * steps + lax.rem(i + worker, jnp.int32(steps))
                columns = pl.ds(pl.multiple_of(block * BLOCK, BLOCK), BLOCK)
                plgpu.copy_gmem_to_smem(codes_ref.at[block, heights], codes_smem.at[slot], filled.at[slot])
                plgpu.copy_gmem_to_smem(x_ref.at[:, columns], x_smem.at[slot], filled.at[slot])
                plgpu.copy_gmem_to_smem(scales_ref.at[pl.ds(block * parts, parts), heights], scales_smem.at[slot], filled.at[slot])
                return count + 1

            return lax.fori_loop(0, steps, step, count)

        count = lax.fori_loop(begin, end, fetch_chunk, jnp.int32(0))
        for slot in range(stages):  # see every phase of a barrier out, as the interpreter demands

            @pl.when(slot < count)
            def _(slot=slot):
                plgpu.barrier_wait(emptied.at[slot])

    @pl.when(warpgroup < teams)
    def _compute():
        def product(numbers, slot, part):
            tokens = x_smem.at[slot, :, pl.ds(part * width, width)]
            if interpret:  # the interpreter's wgmma takes no registers
                return lax.dot_general(numbers.astype(jnp.float32), tokens[...].astype(jnp.float32), (((1,), (1,)), ((), ())))

            def multiply(sums):
                plgpu.wgmma(sums, numbers, tokens.transpose((1, 0)))
                plgpu.wgmma_wait(0)
                return sums[...]

            return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((HEIGHT, lanes), jnp.float32))

        def compute_chunk(chunk, count):
            def step(i, carry):
                del i
                count, total = carry
                slot = lax.rem(count, jnp.int32(stages))
                plgpu.barrier_wait(filled.at[slot])
                words = plgpu.load(codes_smem.at[slot, warpgroup], layout=plgpu.Layout.WGMMA)
                scales = [plgpu.load(scales_smem.at[slot, part, warpgroup], layout=_ROW) for part in range(parts)]
                for part, numbers in enumerate(_numbers(words, parts, x_ref.dtype, interpret)):
                    scale = lax.broadcast_in_dim(scales[part].astype(jnp.float32), (HEIGHT, lanes), (0,))
                    total = total + product(numbers, slot, part) * scale
                plgpu.barrier_arrive(emptied.at[slot])
                return count + 1, total

            total = plgpu.layout_cast(jnp.zeros((HEIGHT, lanes), jnp.float32), plgpu.Layout.WGMMA)
            count, rest = lax.fori_loop(0, steps, step, (count, total))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for plane in range(planes):
                part = rest.astype(sums_ref.dtype)
                out_smem.at[warpgroup, plane].transpose((1, 0))[...] = part
                if plane + 1 < planes:
                    rest = rest - part.astype(jnp.float32)
            plgpu.commit_smem()
            row = (lax.div(chunk, splits) * teams + warpgroup) * HEIGHT
            place = lax.rem(chunk, splits) * planes
            for plane in range(planes):
                rows = pl.ds(pl.multiple_of(row, HEIGHT), HEIGHT)
                plgpu.copy_smem_to_gmem(out_smem.at[warpgroup, plane], sums_ref.at[place + plane, :, rows])
            return count

        lax.fori_loop(begin, end, compute_chunk, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)


_ROW = plgpu.Layout.WGMMA.reduce(1)


def _numbers(words: jax.Array, parts: int, dtype: jnp.dtype, interpret: bool) -> list[jax.Array]:
    """The numbers of uint16 words [64, 32] in dtype, one [64, 128 / parts] for each group."""
    each = 4 // parts
    if interpret:
        planes = [((words >> jnp.uint16(4 * plane)) & jnp.uint16(15)).astype(dtype) - 8 for plane in range(4)]
        return [jnp.concatenate(planes[part * each : (part + 1) * each], axis=1) for part in range(parts)]
    result = plgpu.ShapeDtypeStruct((HEIGHT, BLOCK // parts), dtype, layout=plgpu.Layout.WGMMA)

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA,), return_type=[result] * parts)
    def unpacked(ctx, words):
        del ctx
        pair = ir.VectorType.get((2,), ir.BF16Type.get() if dtype == jnp.bfloat16 else ir.F16Type.get())
        word = ir.IntegerType.get_signless(32)

        def plane_of(register, plane):
            return bitcast(llvm.inline_asm(word, [bitcast(register, word)], four_bit_asm(plane, 8, dtype), "=r,r"), pair)

        planes = []
        for plane in range(4):
            registers = np.empty_like(words.registers)
            for place, register in np.ndenumerate(words.registers):
                registers[place] = plane_of(register, plane)
            planes.append(registers)
        # Tiles of 8 columns are the second axis of the registers.
        joined = [np.concatenate(planes[part * each : (part + 1) * each], axis=1) for part in range(parts)]
        return [mgpu.FragmentedArray(_registers=registers, _layout=words.layout, _is_signed=None) for registers in joined]

    return unpacked(words)
