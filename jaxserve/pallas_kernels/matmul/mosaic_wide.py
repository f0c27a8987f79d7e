"""Many tokens times a weight for sm_90 (Hopper), in Pallas Mosaic GPU: batches for which the tensor cores bind and not the memory.

The tokens are wgmma's left operand, 64 or 128 a warpgroup, and rows of the weight its right one, any multiple of 8 at once: the rows
are cut so that the tiles fill all multiprocessors in whole rounds, which the few tile sizes of a library do not. A block of threads has
a warpgroup that fetches by TMA and runs ahead over the borders of tiles, and two or three that compute. Blocks of a cluster share
fetches. Where the rows are too few, the columns are cut too, and the partial sums go to the reader in float32. A gated product
takes gate and up rows of the same units in one tile, so that SwiGLU needs no pass of its own; nor do the scales of 8-bit products.
"""

import functools
import itertools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxserve.pallas_kernels.float16 import narrowed
from jaxserve.pallas_kernels.mosaic import (
    COMPUTE_REGISTERS,
    FETCH_REGISTERS,
    HEIGHT,
    empty_slot,
    even_workers,
    filled_slot,
    lane_semantics,
    place_in_panel,
    see_out,
    swizzled,
)

BLOCK_BYTES = 128  # of columns fetched at once: the widest swizzle
BLOCK_K = BLOCK_BYTES // 2  # so many columns of 16 bits
_TOKENS = range(225, 257)
_FEWEST_PROMPT_TOKENS = 1024  # of a gated product
_FEWEST_ADDED_TOKENS, _MOST_ADDED_DEPTH = 2048, 8192
_ADDED_PIECE = 32  # columns of float32 sums that are stored at once: the 128 bytes that TMA swizzles
_FEWEST_BYTES = 32 * 2**20
_LEAST_DEPTH = 3072  # of a share of the columns: below it partial sums weigh too much


@dataclass(frozen=True)
class WideMatmulConfig:
    """How the kernel is cut.

    Attributes:
        warpgroups: that compute, 2 or 3.
        tokens: of a warpgroup, 64 or 128.
        rows: of the weight a block computes at once, a multiple of 8; half of them gate and half up rows in a gated product.
        splits: shares of the columns, each with partial sums of its own.
        num_stages: fetches in flight.
        num_blocks: at most so many blocks of threads; each walks several tiles if there are more.
        row_cluster: blocks with the same tokens that fetch them together, each a share for all of them.
        token_cluster: blocks with the same rows that fetch those together.
        panel: groups of tokens (a cluster's) that are walked together, rows by rows, so that what they fetch stays in L2.
        in_planes: partial sums leave as mosaic.py's do, two numbers of 16 bits each, so that they have its bits.
        out_slots: pieces of a warpgroup's tile that may be on their way out at once; divides their number.
    """

    warpgroups: int
    tokens: int
    rows: int
    splits: int
    num_stages: int
    num_blocks: int
    row_cluster: int = 1
    token_cluster: int = 1
    panel: int = 1 << 30
    in_planes: bool = False
    out_slots: int = 1

    @classmethod
    def suited(cls, x: jax.Array, weight: jax.Array, num_multiprocessors: int, gated: bool = False) -> "WideMatmulConfig | None":
        """The cut for x [T, K] and weight [N, K]; None where the kernel does not go, or where nobody has measured that it is faster.

        By measurements on an H200 (docs/performance_gpu.md): a tile of tokens that is nearly full, deep shares of the columns, and
        tiles that fill the multiprocessors in whole rounds.
        """
        (num_tokens, depth), size = x.shape, weight.shape[0]
        if x.dtype not in (jnp.bfloat16, jnp.float16) or weight.dtype != x.dtype or 2 * size * depth < _FEWEST_BYTES:
            return None
        cluster, best = 2, None
        if gated and num_tokens >= _FEWEST_PROMPT_TOKENS and num_tokens % 256 == size % 256 == depth % BLOCK_K == 0:
            # No faster than a library, but for what SwiGLU costs after one.
            return cls(2, 64, 256, 1, 4, num_multiprocessors, token_cluster=cluster, panel=8)
        if num_tokens not in _TOKENS:
            return None
        for rows in range(128, 63, -16):
            for splits in (1,) if gated else (1, 2, 4):
                if size % (rows * cluster) or depth % (splits * BLOCK_K) or depth // splits < _LEAST_DEPTH:
                    continue
                tiles = size // rows * splits
                rounds = pl.cdiv(tiles, num_multiprocessors)
                cost = rounds * (rows + 16) / splits  # a step has some work whatever its rows
                if tiles >= 0.9 * rounds * num_multiprocessors and (best is None or cost < best[0]):
                    best = cost, rows, splits
        if best is None:
            return None
        _, rows, splits = best
        if gated:  # as large a tile, of which less passes through SMEM
            return cls(2, 64, 2 * rows, splits, 4, num_multiprocessors, token_cluster=cluster)
        return cls(2, 128, rows, splits, 4, num_multiprocessors, cluster)

    @classmethod
    def suited_to_add(cls, x: jax.Array, weight: jax.Array, residual: jax.Array, num_multiprocessors: int) -> "WideMatmulConfig | None":
        """The cut for a product that is added to a residual stream [T, N]; None where a library's is to be.

        By measurements on an H200 (docs/performance_gpu.md): of deep products the addition is too small a part to gain by.
        """
        (num_tokens, depth), size = x.shape, weight.shape[0]
        if x.dtype != jnp.bfloat16 or weight.dtype != x.dtype or residual.dtype != jnp.float32 or 2 * size * depth < _FEWEST_BYTES:
            return None
        if num_tokens < _FEWEST_ADDED_TOKENS or depth > _MOST_ADDED_DEPTH or num_tokens % 256 or size % 256 or depth % BLOCK_K:
            return None
        tiles = num_tokens // 128 * (size // 256)
        if tiles < 0.9 * pl.cdiv(tiles, num_multiprocessors) * num_multiprocessors:
            return None
        return cls(2, 64, 256, 1, 4, num_multiprocessors, token_cluster=2, panel=8, out_slots=2)

    @property
    def token_tile(self) -> int:
        """Tokens of a block."""
        return self.warpgroups * self.tokens


@functools.partial(jax.jit, static_argnames=("config", "gated", "out_dtype", "interpret"))
def matmul_wide(
    x: jax.Array,
    weight: jax.Array,
    scales: tuple[jax.Array, jax.Array] | None = None,
    *,
    config: WideMatmulConfig,
    gated: bool = False,
    out_dtype: jnp.dtype | None = None,
    interpret: bool = False,
) -> jax.Array:
    """x [T, K] times the transposed weight [N, K], both bfloat16, float16 or float8_e4m3fn, with sums in float32; the same in every run.

    Args:
        scales: float32 [T] and [N], what a token's and a row's sums are multiplied by; with float8, and one split, alone.
        out_dtype: of what is not a float32 partial sum; None: x's, with scales bfloat16.

    Returns:
        [1, T, N] in out_dtype; gated: silu(gate) * up, [1, T, N / 2], of the weight's gate rows and the up rows
        after them; with several splits: their partial sums, float32 [splits, T, N], or two in out_dtype for each, [2 * splits, T, N].

    Raises:
        ValueError: a config that does not divide the shapes, or scales where none belong.
    """
    return _multiply(x, weight, scales, None, config, gated, out_dtype, interpret)


@functools.partial(jax.jit, static_argnames=("config", "interpret"))
def add_matmul_wide(
    x: jax.Array, weight: jax.Array, residual: jax.Array, *, config: WideMatmulConfig, interpret: bool = False
) -> jax.Array:
    """The residual stream, float32 [T, N], plus x [T, K] times the transposed weight [N, K]; the same in every run.

    Sums leave by TMA's reducing stores, which add in L2: no block reads the stream, and each number is added to once. In place
    where the caller needs the residual no more.

    Raises:
        ValueError: a config that does not divide the shapes.
    """
    is_whole = config.splits == 1 and x.shape[0] % (config.token_tile * config.token_cluster) == 0
    pieces = config.rows // _ADDED_PIECE * (config.tokens // HEIGHT)
    if not is_whole or config.rows % _ADDED_PIECE or pieces % config.out_slots:
        raise ValueError(f"x {x.shape} cannot be cut by {config} to be added")
    return _multiply(x, weight, None, residual[None], config, False, jnp.dtype(jnp.float32), interpret)[0]


def _multiply(
    x: jax.Array,
    weight: jax.Array,
    scales: tuple[jax.Array, jax.Array] | None,
    residual: jax.Array | None,
    config: WideMatmulConfig,
    gated: bool,
    out_dtype: jnp.dtype | None,
    interpret: bool,
) -> jax.Array:
    """As `matmul_wide`, added to a residual stream where there is one, float32 [1, T, N]."""
    num_tokens, depth = x.shape
    units = weight.shape[0] // (2 if gated else 1)
    width = config.rows // (2 if gated else 1)
    cluster = config.row_cluster, config.token_cluster
    block = BLOCK_BYTES // x.dtype.itemsize
    if units % (width * config.row_cluster) or depth % (config.splits * block) or (gated and config.splits > 1):
        raise ValueError(f"a weight {weight.shape} cannot be cut by {config}")
    if (scales is not None) != (x.dtype == jnp.float8_e4m3fn) or (scales is not None and config.splits > 1):
        raise ValueError(f"{x.dtype} in {config.splits} splits {'without' if scales is None else 'with'} scales")
    out_dtype = jnp.dtype(out_dtype or (x.dtype if scales is None else jnp.bfloat16))
    padded = pl.cdiv(num_tokens, config.token_tile * config.token_cluster) * config.token_tile * config.token_cluster
    chunks = units // (width * config.row_cluster) * (padded // (config.token_tile * config.token_cluster)) * config.splits
    workers = even_workers(chunks, config.num_blocks // math.prod(cluster))
    tiled = swizzled(block, x.dtype)
    stages, warpgroups = config.num_stages, config.warpgroups
    sharing = tuple(name for name, blocks in zip(("row_member", "token_member"), cluster, strict=True) if blocks > 1)
    emptied = plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages)
    if sharing:
        emptied = plgpu.ClusterBarrier(collective_axes=sharing, num_arrivals=warpgroups, num_barriers=stages)
    planes = 2 if config.in_planes else 1
    of_parts = config.splits > 1 and not config.in_planes
    adds = residual is not None
    is_staged = adds or (not of_parts and out_dtype != jnp.float32)
    rows_out = padded if is_staged or of_parts or num_tokens % config.tokens else num_tokens  # the last copied out of no larger array
    pieces = (_ADDED_PIECE,) if adds else (64, 32)
    piece = next((columns for columns in pieces if width % columns == 0), width)  # of a tile that is stored at once
    # Rows of other widths lie in SMEM as they are: 112 bytes, say, are free of bank conflicts.
    transforms = swizzled(piece, out_dtype) if piece in pieces else ()
    staged = plgpu.SMEM((warpgroups, config.out_slots, HEIGHT, piece), out_dtype, transforms=transforms)
    out_type = jax.ShapeDtypeStruct((config.splits * planes, rows_out, units), jnp.float32 if of_parts else out_dtype)
    options = dict(gated=gated, scaled=scales is not None, adds=adds, width=width, chunks=chunks, workers=workers)
    kernel = plgpu.kernel(
        functools.partial(_wide_kernel, config=config, **options),
        out_type=() if adds else out_type,
        scratch_types=(
            plgpu.SMEM((stages, warpgroups, config.tokens, block), x.dtype, transforms=tiled),
            plgpu.SMEM((stages, config.rows, block), x.dtype, transforms=tiled),
            plgpu.Barrier(num_arrivals=warpgroups + (2 if gated else 1), num_barriers=stages),
            emptied,
            *([staged] if is_staged else []),
        ),
        grid=(workers,),
        grid_names=("worker",),
        cluster=cluster if sharing else (),
        cluster_names=("row_member", "token_member") if sharing else (),
        num_threads=config.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=lane_semantics(approx_math=True),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )
    padding = 0, padded - num_tokens
    x = jnp.pad(x, (padding, (0, 0)))
    if residual is not None:
        stream = jax.new_ref(residual)  # what a kernel writes to so, XLA updates in place
        kernel(x, weight, stream)
        return jax.freeze(stream)
    return kernel(x, weight, *([] if scales is None else [jnp.pad(scales[0], padding), scales[1]]))[:, :num_tokens]


def _wide_kernel(
    x_ref, weight_ref, *refs, config: WideMatmulConfig, gated: bool, scaled: bool, adds: bool, width: int, chunks: int, workers: int
):  # fmt: skip
    scale_refs, (out_ref, x_smem, weight_smem, filled, emptied, *staged) = refs[: 2 * scaled], refs[2 * scaled :]
    out_smem, block = staged[0] if staged else None, x_smem.shape[-1]
    stages, warpgroups, tokens = config.num_stages, config.warpgroups, config.tokens
    splits = jnp.int32(config.splits)
    padded, depth = x_ref.shape
    units = out_ref.shape[-1]
    steps = depth // config.splits // block
    token_groups = jnp.int32(padded // (config.token_tile * config.token_cluster))
    worker = lax.axis_index("worker")
    warpgroup = lax.axis_index("warpgroup")
    shares = config.row_cluster * config.token_cluster > 1
    row_member = lax.axis_index("row_member") if shares else 0
    token_member = lax.axis_index("token_member") if shares else 0
    token_sharers = "row_member" if config.row_cluster > 1 else None
    row_sharers = "token_member" if config.token_cluster > 1 else None
    num_chunks = lax.div(chunks - worker + (workers - 1), jnp.int32(workers))
    panel = jnp.int32(min(config.panel, padded // (config.token_tile * config.token_cluster)))
    row_groups = jnp.int32(units // (width * config.row_cluster) * config.splits)

    def place(i):
        """Of this block's i-th chunk: its first token, its first unit, its share of the columns."""
        group, rest = place_in_panel(worker + i * workers, panel, row_groups, token_groups)
        token = (group * config.token_cluster + token_member) * config.token_tile
        unit = (lax.div(rest, splits) * config.row_cluster + row_member) * width
        return pl.multiple_of(token, config.token_tile), pl.multiple_of(unit, width), lax.rem(rest, splits)

    @pl.when(warpgroup == warpgroups)
    def _fetch():
        plgpu.set_max_registers(FETCH_REGISTERS, action="decrease")

        def fetch_chunk(i, count):
            token, unit, share = place(i)

            def step(k, count):
                slot = empty_slot(emptied, count)
                columns = pl.ds(pl.multiple_of((share * steps + k) * block, block), block)
                for group in range(warpgroups):
                    plgpu.copy_gmem_to_smem(
                        x_ref.at[pl.ds(token + group * tokens, tokens), columns], x_smem.at[slot, group], filled.at[slot],
                        collective_axes=token_sharers,
                    )  # fmt: skip
                for half in range(2 if gated else 1):
                    plgpu.copy_gmem_to_smem(
                        weight_ref.at[pl.ds(unit + half * units, width), columns], weight_smem.at[slot, pl.ds(half * width, width)],
                        filled.at[slot], collective_axes=row_sharers,
                    )  # fmt: skip
                return count + 1

            return lax.fori_loop(0, steps, step, count)

        count = lax.fori_loop(0, num_chunks, fetch_chunk, jnp.int32(0))
        see_out(emptied, count)

    @pl.when(warpgroup < warpgroups)
    def _compute():
        plgpu.set_max_registers(COMPUTE_REGISTERS[warpgroups], action="increase")

        def compute_chunk(i, count):
            def accumulate(total):
                def step(k, count):
                    slot = filled_slot(filled, count)
                    plgpu.wgmma(total, x_smem.at[slot, warpgroup], weight_smem.at[slot].transpose((1, 0)))
                    plgpu.wgmma_wait(1)  # so the step before is done, while the tensor cores are at this one

                    @pl.when(k > 0)
                    def _():
                        plgpu.barrier_arrive(emptied.at[lax.rem(count - 1, jnp.int32(stages))])

                    return count + 1

                count_after = lax.fori_loop(0, steps, step, count)
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(emptied.at[lax.rem(count_after - 1, jnp.int32(stages))])
                return count_after, total[...]

            count, total = pl.run_scoped(accumulate, plgpu.WGMMAAccumulatorRef((tokens, config.rows), jnp.float32))
            token, unit, share = place(i)
            token = token + warpgroup * tokens
            if scaled:
                total = total * _scale(scale_refs[0], token, tokens, total.shape, 0)
            if scaled and not gated:
                total = total * _scale(scale_refs[1], unit, width, total.shape, 1)
            if gated:
                gate, up = total[:, :width], total[:, width:]
                if scaled:
                    gate = gate * _scale(scale_refs[1], unit, width, gate.shape, 1)
                    up = up * _scale(scale_refs[1], unit + units, width, up.shape, 1)
                total = gate / (1 + jnp.exp(-gate)) * up
            if out_smem is None:

                def store():
                    out_ref.at[share, pl.ds(token, tokens), pl.ds(unit, width)][...] = total

                store() if out_ref.shape[1] == padded else pl.when(token < out_ref.shape[1])(store)
                return count
            piece, planes = out_smem.shape[-1], 2 if config.in_planes else 1
            for plane in range(planes):
                part = total if adds else narrowed(total, out_ref.dtype)
                corners = itertools.product(range(0, tokens, HEIGHT), range(0, width, piece))
                for out_slot, (top, left) in zip(itertools.cycle(range(config.out_slots)), corners, strict=False):
                    plgpu.wait_smem_to_gmem(config.out_slots - 1, wait_read_only=True)
                    slot = out_smem.at[warpgroup, out_slot]
                    slot[...] = part[top : top + HEIGHT, left : left + piece]
                    plgpu.commit_smem()
                    number = 0 if config.splits == 1 else share * planes + plane
                    where = number, pl.ds(token + top, HEIGHT), pl.ds(unit + left, piece)
                    plgpu.copy_smem_to_gmem(slot, out_ref.at[where], reduction_op="add" if adds else None)
                if plane + 1 < planes:
                    total = total - part.astype(jnp.float32)
            return count

        lax.fori_loop(0, num_chunks, compute_chunk, jnp.int32(0))
        if out_smem is not None:
            plgpu.wait_smem_to_gmem(0)


def _scale(ref, start, number: int, shape: tuple[int, int], axis: int):
    """Part of the scales of one axis of a tile, as large as the tile."""
    part = plgpu.load(ref.at[pl.ds(start, number)], layout=plgpu.Layout.WGMMA.reduce(1 - axis), optimized=False)
    return lax.broadcast_in_dim(part, shape, (axis,))
