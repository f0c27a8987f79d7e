"""Many tokens times a weight of 4 or 8 bits for sm_90 (Hopper), in Pallas Mosaic GPU: for batches where the tensor cores bind.

A block of threads has a warpgroup that fetches by TMA and runs ahead over the borders of tiles, and some that compute: each takes 64 rows
of the weight and up to 256 tokens. It makes codes 16 bits wide and multiplies them by their scales in registers, in the very places where
wgmma wants its left operand, while the tensor cores are at the columns before: so one accumulator serves all groups, and widened weights
lie neither in memory nor in SMEM. Where codes of 8 bits have a scale a row, that multiplies the sums. Blocks of a cluster share fetches of
tokens. Where the rows are too few, the columns are cut too. Of a gated product one warpgroup has 64 gate rows and another the up rows of
the same units, so that SwiGLU needs no pass of its own.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxserve.pallas_kernels.mosaic import (
    BY_ROW,
    COMPUTE_REGISTERS,
    FETCH_REGISTERS,
    HEIGHT,
    empty_slot,
    even_workers,
    lane_semantics,
    place_in_panel,
    see_out,
    swizzled,
)
from jaxserve.pallas_kernels.quantized_matmul.weights import BLOCK, EightBitWeight, FourBitWeight
from jaxserve.pallas_kernels.quantized_matmul.widening import Meaning, scaled_numbers
from jaxserve.pallas_kernels.quantized_matmul.widening_eight_bit import eight_bit_numbers

_LANES_STEP = 32
_HALF = BLOCK // 2  # columns that are multiplied at once: 128 bytes, the widest swizzle


@dataclass(frozen=True)
class WideQuantizedConfig:
    """How the kernel is cut.

    Attributes:
        warpgroups: that compute, 2 or 3, of a gated product 2; each has 64 rows of a tile.
        tokens: of a tile at most, a multiple of 32 up to 256.
        splits: shares of the columns, each with partial sums of its own.
        num_stages: fetches of 64 columns of tokens in flight.
        code_stages: fetches of 128 columns of codes in flight.
        num_blocks: at most so many blocks of threads; each walks several tiles if there are more.
        cluster: blocks with the same tokens that fetch them together, each a share for all of them.
        panel: tiles of tokens that are walked together, rows by rows, so that what they fetch stays in L2.
        takes_turns: warpgroups issue products one after the other, so that one widens codes while the tensor cores are at another's.
    """

    warpgroups: int
    tokens: int
    splits: int
    num_stages: int
    code_stages: int
    num_blocks: int
    cluster: int = 1
    panel: int = 8
    takes_turns: bool = False


def wide_token_tiles(num_tokens: int, most: int) -> tuple[int, int]:
    """The tokens of a tile, a multiple of 32 and at most so many, and how many tiles hold them all."""
    tiles = pl.cdiv(num_tokens, most)
    return pl.cdiv(num_tokens, _LANES_STEP * tiles) * _LANES_STEP, tiles


@functools.partial(jax.jit, static_argnames=("config", "gated", "interpret"))
def quantized_matmul_wide(
    x: jax.Array, weight: FourBitWeight | EightBitWeight, *, config: WideQuantizedConfig, gated: bool = False, interpret: bool = False
) -> jax.Array:
    """x [T, K], bfloat16 or float16, times the transposed weight [N, K]; one with minima has neither zeros nor a table.

    The weight is rounded to x's dtype, as `dequantize` does; codes of 8 bits with a scale a row and no zeros need no rounding. N is a
    multiple of 64 * warpgroups * cluster, K of 128 * splits; x has as many columns. The same bits in every run.

    Returns:
        [P, T, N] in x's dtype, parts whose sum is the product: one, or two for each split, as quantized_matmul_mosaic's; gated:
        silu(gate) * up, [1, T, N / 2], of the weight's gate rows and the up rows after them.

    Raises:
        ValueError: a config that does not divide the shapes.
    """
    num_tokens, (size, depth) = x.shape[0], weight.shape
    lanes, tiles = wide_token_tiles(num_tokens, config.tokens)
    teams, cluster, splits = config.warpgroups, config.cluster, config.splits
    if size % (HEIGHT * teams * cluster) or depth % (BLOCK * splits) or (gated and (teams, splits) != (2, 1)):
        raise ValueError(f"a weight {weight.shape} cannot be cut by {config}")
    heights = size // HEIGHT
    chunks = heights // (teams * cluster) * splits * tiles
    workers = even_workers(chunks, config.num_blocks // cluster)
    parts = max(1, BLOCK // weight.group)
    four_bit = isinstance(weight, FourBitWeight)
    codes = weight.codes.reshape(-1, heights, HEIGHT, BLOCK // 4) if four_bit else weight.codes.reshape(heights, HEIGHT, depth)
    tile = HEIGHT, BLOCK // 4 if four_bit else BLOCK
    by_row = not four_bit and len(weight.scales) == 1 and weight.zeros is None
    # Of a gated product those of gate and up rows are fetched at once: of one half alone they may be too few bytes for a copy.
    tall = (2, heights // 2) if gated else (heights,)
    scales = weight.scales.reshape(heights, HEIGHT) if by_row else weight.scales.reshape(-1, *tall, HEIGHT)
    corrections = weight.minima if four_bit and weight.minima is not None else weight.zeros
    corrections = None if corrections is None else corrections.reshape(-1, *tall, HEIGHT)
    scales_smem = functools.partial(plgpu.SMEM, (config.code_stages, parts, teams, HEIGHT))
    piece = _HALF if lanes % _HALF == 0 else _LANES_STEP  # tokens that are stored at once
    emptied = plgpu.Barrier(num_arrivals=teams, num_barriers=config.num_stages)
    if cluster > 1:
        emptied = plgpu.ClusterBarrier(collective_axes=("member",), num_arrivals=teams, num_barriers=config.num_stages)
    sums = plgpu.kernel(
        functools.partial(
            _wide_kernel,
            config=config,
            gated=gated,
            group=weight.group,
            chunks=chunks,
            workers=workers,
            meaning=Meaning.of(weight, x.dtype) if isinstance(weight, FourBitWeight) else None,
            interpret=interpret,
        ),
        out_type=jax.ShapeDtypeStruct((splits * (1 if splits == 1 else 2), lanes * tiles, size // (2 if gated else 1)), x.dtype),
        scratch_types=(
            plgpu.SMEM((config.num_stages, lanes, _HALF), x.dtype, transforms=swizzled(_HALF, x.dtype)),
            plgpu.SMEM((config.code_stages, teams, *tile), codes.dtype, transforms=swizzled(tile[1], codes.dtype)),
            None if by_row else scales_smem(scales.dtype),
            None if corrections is None else scales_smem(corrections.dtype),
            plgpu.SMEM((max(2 * teams, lanes // piece), piece, HEIGHT), x.dtype, transforms=swizzled(HEIGHT // 2, x.dtype)),
            plgpu.Barrier(num_arrivals=1, num_barriers=config.num_stages),
            emptied,
            plgpu.Barrier(num_arrivals=1 + gated + (not by_row) + (corrections is not None), num_barriers=config.code_stages),
            plgpu.Barrier(num_arrivals=teams, num_barriers=config.code_stages),
            plgpu.Barrier(num_arrivals=1, num_barriers=2),
            plgpu.Barrier(num_arrivals=1, num_barriers=teams) if config.takes_turns else None,
        ),
        grid=(workers,),
        grid_names=("worker",),
        cluster=(cluster,) if cluster > 1 else (),
        cluster_names=("member",) if cluster > 1 else (),
        num_threads=teams + 1,
        thread_name="warpgroup",
        compiler_params=lane_semantics(approx_math=True),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )(
        jnp.pad(x, ((0, lanes * tiles - num_tokens), (0, 0))), codes, scales, corrections,
        jnp.full((1,), 8 if four_bit and not weight.values else 0, jnp.int32),
    )  # fmt: skip
    return sums[:, :num_tokens]


def _wide_kernel(
    x_ref, codes_ref, scales_ref, corrections_ref, one_zero_ref, sums_ref, x_smem, codes_smem, scales_smem, corrections_smem, out_smem,
    filled, emptied, codes_filled, codes_emptied, handed_over, turns,
    *, config: WideQuantizedConfig, gated: bool, group: int, chunks: int, workers: int, meaning: Meaning | None, interpret: bool,
):  # fmt: skip
    teams, stages, cluster = config.warpgroups, config.num_stages, config.cluster
    splits, planes = jnp.int32(config.splits), sums_ref.shape[0] // config.splits
    lanes, parts, piece = x_smem.shape[1], max(1, BLOCK // group), out_smem.shape[1]
    four_bit, dtype = meaning is not None, x_ref.dtype
    heights = codes_ref.shape[1 if four_bit else 0]
    steps = x_ref.shape[1] // BLOCK // config.splits
    tiles = jnp.int32(x_ref.shape[0] // lanes)
    worker, warpgroup = lax.axis_index("worker"), lax.axis_index("warpgroup")
    member = lax.axis_index("member") if cluster > 1 else 0
    num_chunks = lax.div(chunks - worker + (workers - 1), jnp.int32(workers))
    panel = jnp.int32(min(config.panel, x_ref.shape[0] // lanes))
    row_groups = jnp.int32(heights // (teams * cluster) * config.splits)
    rows = 1 if gated else teams  # in units of 64, of which the tile's copies begin

    def place(i):
        """Of this block's i-th chunk: its first token, its first row (or gate row) in units of 64, its share of the columns."""
        tile, rest = place_in_panel(worker + i * workers, panel, row_groups, tiles)
        return pl.multiple_of(tile * lanes, _LANES_STEP), (lax.div(rest, splits) * cluster + member) * rows, lax.rem(rest, splits)

    @pl.when(warpgroup == teams)
    def _fetch():
        plgpu.set_max_registers(FETCH_REGISTERS, action="decrease")

        def fetch_chunk(i, count):
            token, first, share = place(i)

            def step(k, count):
                block = share * steps + k
                slot = empty_slot(codes_emptied, count)
                groups = pl.ds(block * parts if group <= BLOCK else lax.div(block, jnp.int32(group // BLOCK)), parts)
                for half in range(teams // rows):
                    source, place = pl.ds(first + half * (heights // 2), rows), pl.ds(half * rows, rows)
                    columns = pl.ds(pl.multiple_of(block * BLOCK, BLOCK), BLOCK)
                    codes = codes_ref.at[block, source] if four_bit else codes_ref.at[source, :, columns]
                    plgpu.copy_gmem_to_smem(codes, codes_smem.at[slot, place], codes_filled.at[slot])
                for ref, smem in ((scales_ref, scales_smem), (corrections_ref, corrections_smem)):
                    if smem is not None:
                        source = ref.at[groups, :, first] if gated else ref.at[groups, pl.ds(first, teams)]
                        plgpu.copy_gmem_to_smem(source, smem.at[slot], codes_filled.at[slot])
                for half in range(2):
                    x_slot = empty_slot(emptied, 2 * count + half)
                    columns = pl.ds(pl.multiple_of(block * BLOCK + half * _HALF, _HALF), _HALF)
                    plgpu.copy_gmem_to_smem(
                        x_ref.at[pl.ds(token, lanes), columns], x_smem.at[x_slot], filled.at[x_slot],
                        collective_axes="member" if cluster > 1 else None,
                    )  # fmt: skip
                return count + 1

            return lax.fori_loop(0, steps, step, count)

        count = lax.fori_loop(0, num_chunks, fetch_chunk, jnp.int32(0))
        see_out(codes_emptied, count)
        see_out(emptied, 2 * count)

    @pl.when(warpgroup < teams)
    def _compute():
        plgpu.set_max_registers(COMPUTE_REGISTERS[teams], action="increase")
        one_zero = plgpu.layout_cast(lax.broadcast_in_dim(one_zero_ref[0], (HEIGHT,), ()), BY_ROW)

        def slot_of(fetch, slots):
            """Without a sign, which would cost instructions of every step."""
            return lax.rem(fetch.astype(jnp.uint32), jnp.uint32(slots)).astype(jnp.int32)

        def step(k, carry, sums=None):
            """Adds a block's product to sums, wgmma's accumulator; in the interpreter to the carry, whose wgmma takes no registers."""
            count, total = carry
            slot = slot_of(count, config.code_stages)
            plgpu.barrier_wait(codes_filled.at[slot])
            codes = plgpu.load(codes_smem.at[slot, warpgroup], layout=plgpu.Layout.WGMMA)

            def of_rows(smem, part):
                return plgpu.load(smem.at[slot, part, warpgroup], layout=BY_ROW)

            scales = [] if scales_smem is None else [of_rows(scales_smem, part).astype(jnp.float32) for part in range(parts)]
            correction_dtype = jnp.float32 if meaning is not None and meaning.has_minima else jnp.int32
            corrections = [
                one_zero if corrections_ref is None else of_rows(corrections_smem, part).astype(correction_dtype) for part in range(parts)
            ]
            plgpu.barrier_arrive(codes_emptied.at[slot])
            before = slot_of(2 * count + stages - 1, stages)
            for half in range(2):
                fetch = 2 * count + half
                x_slot = slot_of(fetch, stages)
                if meaning is None:
                    zeros = None if corrections_ref is None else corrections
                    numbers = eight_bit_numbers(codes, half, scales, zeros, dtype, interpret)
                else:
                    numbers = scaled_numbers(codes, half, scales, corrections, meaning, interpret)
                plgpu.barrier_wait(filled.at[x_slot])
                if interpret:
                    operands = numbers.astype(jnp.float32), x_smem[x_slot].astype(jnp.float32)
                    total = total + lax.dot_general(*operands, (((1,), (1,)), ((), ())))
                if turns is not None:

                    @pl.when((warpgroup > 0) | (fetch > 0))
                    def _():
                        plgpu.barrier_wait(turns.at[warpgroup])

                if sums is not None:
                    plgpu.wgmma(sums, numbers, x_smem.at[x_slot].transpose((1, 0)))
                if turns is not None:
                    plgpu.barrier_arrive(turns.at[lax.rem(warpgroup + 1, jnp.int32(teams))])
                if not interpret:
                    plgpu.wgmma_wait(1)  # so the columns before are done, while the tensor cores are at these

                @pl.when((k > 0) | (half > 0))
                def _(before=before):
                    plgpu.barrier_arrive(emptied.at[before])

                before = x_slot
            return count + 1, total

        def compute_chunk(i, count):
            if scales_smem is None:  # asked for before the products, so that nothing waits for them
                height = place(i)[1] + (warpgroup * (heights // 2) if gated else warpgroup)
                by_row = plgpu.load(scales_ref.at[height], layout=BY_ROW, optimized=False).astype(jnp.float32)
            else:
                by_row = None

            def sum_all(sums):
                after, _ = lax.fori_loop(0, steps, functools.partial(step, sums=sums), (count, jnp.float32(0)))
                return after, sums[...]

            if interpret:
                count, rest = lax.fori_loop(0, steps, step, (count, jnp.zeros((HEIGHT, lanes), jnp.float32)))
            else:
                count, rest = pl.run_scoped(sum_all, plgpu.WGMMAAccumulatorRef((HEIGHT, lanes), jnp.float32))
            plgpu.barrier_arrive(emptied.at[lax.rem(2 * count - 1, jnp.int32(stages))])
            if by_row is not None:
                rest = rest * lax.broadcast_in_dim(by_row, rest.shape, (0,))
            (store_gated if gated else store)(i, rest)
            return count

        def store(i, total):
            token, first, share = place(i)
            rows = pl.ds(pl.multiple_of((first + warpgroup) * HEIGHT, HEIGHT), HEIGHT)
            for n, left in enumerate(range(0, lanes, piece)):
                rest = total[:, left : left + piece]
                for plane in range(planes):
                    buffer = out_smem.at[2 * warpgroup + (n * planes + plane) % 2]
                    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                    part = rest.astype(dtype)
                    buffer.transpose((1, 0))[...] = part
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(buffer, sums_ref.at[share * planes + plane, pl.ds(token + left, piece), rows])
                    if plane + 1 < planes:
                        rest = rest - part.astype(jnp.float32)

        def store_gated(i, total):
            """The second warpgroup hands its up rows over in SMEM and goes on; the first one puts the results in their place."""
            given, taken = handed_over.at[0], handed_over.at[1]

            @pl.when(warpgroup == 1)
            def _give():
                @pl.when(i > 0)
                def _():
                    plgpu.barrier_wait(taken)

                for n, left in enumerate(range(0, lanes, piece)):
                    out_smem.at[n].transpose((1, 0))[...] = total[:, left : left + piece].astype(dtype)
                plgpu.barrier_arrive(given)

            @pl.when(warpgroup == 0)
            def _take():
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

                @pl.when(i > 0)
                def _():
                    plgpu.barrier_arrive(taken)

                token, first = place(i)[:2]
                units = pl.ds(pl.multiple_of(first * HEIGHT, HEIGHT), HEIGHT)
                plgpu.barrier_wait(given)
                for n, left in enumerate(range(0, lanes, piece)):
                    gate = total[:, left : left + piece]
                    up = plgpu.load(out_smem.at[n].transpose((1, 0)), layout=plgpu.Layout.WGMMA, optimized=False).astype(jnp.float32)
                    out_smem.at[n].transpose((1, 0))[...] = (gate / (1 + jnp.exp(-gate)) * up).astype(dtype)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(out_smem.at[n], sums_ref.at[0, pl.ds(token + left, piece), units])

        count = lax.fori_loop(0, num_chunks, compute_chunk, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)
        if turns is not None:

            @pl.when((warpgroup == 0) & (count > 0))
            def _():
                plgpu.barrier_wait(turns.at[0])
