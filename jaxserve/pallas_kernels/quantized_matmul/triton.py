"""Few tokens times a weight of 4 or 8 bits for NVIDIA GPUs from sm_80 on, in Pallas-Triton.

The weight is the left operand of the tensor cores, so that a small batch wastes little; its codes become 16-bit numbers in registers,
between SMEM and the tensor core. Sums of a group are float32 and are multiplied by the group's scale, so a scale loses nothing. Where
the rows of a weight are too few to fill the GPU, its columns are cut too, and the partial sums go to the reader.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jaxserve.pallas_kernels.quantized_matmul.upcast import addends, eight_bit_numbers, four_bit_numbers, table_numbers
from jaxserve.pallas_kernels.quantized_matmul.weights import BLOCK, EightBitWeight, FourBitWeight


@dataclass(frozen=True)
class TritonQuantizedConfig:
    """How the kernel is cut.

    Attributes:
        tile: rows of the weight a program computes, a power of two from 16.
        tokens: tokens of a program, a power of two from 16.
        blocks: blocks of 128 columns a step of its loop takes.
        splits: shares of the columns, each with partial sums of its own.
        num_warps: of a program.
        num_stages: steps in flight, Triton's.
    """

    tile: int
    tokens: int
    blocks: int
    splits: int
    num_warps: int
    num_stages: int


@functools.partial(jax.jit, static_argnames=("out_dtype", "config", "interpret"))
def quantized_matmul_triton(
    x: jax.Array, weight: FourBitWeight | EightBitWeight, out_dtype: jnp.dtype, *, config: TritonQuantizedConfig, interpret: bool = False
) -> jax.Array:
    """x [T, K], bfloat16 or float16, times the transposed weight [N, K] without its minima, an EightBitWeight's zeros.

    x has as many columns as the weight. The same bits in every run.

    Returns:
        [P, T, N], a part for each split, float32, or the product in out_dtype.
    """
    num_tokens, size = x.shape[0], weight.shape[0]
    zeros, values = (weight.zeros, weight.values) if isinstance(weight, FourBitWeight) else (None, None)
    one_zero = 8
    if values == tuple(range(16)):
        one_zero, values = 0, None
    one_zeros = _one_zeros(one_zero, x.shape[1], config) if zeros is None and values is None and isinstance(weight, FourBitWeight) else None
    operands = x, weight.codes, weight.scales, zeros, one_zeros
    out = jax.ShapeDtypeStruct((config.splits, num_tokens, size), out_dtype if config.splits == 1 else jnp.float32)
    return pl.pallas_call(
        functools.partial(_quantized_matmul_kernel, group=weight.group, values=values, config=config, interpret=interpret),
        grid=(pl.cdiv(num_tokens, config.tokens), pl.cdiv(size, config.tile), config.splits),
        in_specs=jax.tree.map(lambda _: pl.no_block_spec, operands),
        out_specs=pl.no_block_spec,
        out_shape=out,
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=interpret,
        name="quantized_matmul",
    )(*operands)


def _one_zeros(zero: int, depth: int, config: TritonQuantizedConfig) -> np.ndarray:
    """One zero for all, uint8 [steps, tile], or [1, tile] that is read once.

    Zeros that come with each step, as a group's own do, make the smallest tiles faster (35.9 to 29.1 us, docs/performance_gpu.md). Another
    row that nobody reads is not the same: an array of one value alone would not be a constant of the program but a kernel that fills it.
    """
    steps = pl.cdiv(pl.cdiv(depth, BLOCK), config.splits * config.blocks) + 1 if config.tokens == 16 else 1
    zeros = np.full((steps + 1, config.tile), zero, np.uint8)
    zeros[-1] = zero + 1
    return zeros


def _quantized_matmul_kernel(
    x_ref, codes_ref, scales_ref, zeros_ref, one_zero_ref, out_ref,
    *, group: int, values: tuple[float, ...] | None, config: TritonQuantizedConfig, interpret: bool,
):  # fmt: skip
    (num_tokens, depth), size, dtype = x_ref.shape, scales_ref.shape[1], x_ref.dtype
    four_bit = codes_ref.dtype == jnp.uint16
    num_blocks = pl.cdiv(depth, BLOCK)
    steps = pl.cdiv(pl.cdiv(num_blocks, config.splits), config.blocks)
    per_row = scales_ref.shape[0] == 1
    parts = 1 if per_row else max(1, BLOCK // group)  # groups in a block
    first_token, first_row, split = (pl.program_id(axis) for axis in range(3))
    token = first_token * config.tokens + jnp.arange(config.tokens, dtype=jnp.int32)
    row = first_row * config.tile + jnp.arange(config.tile, dtype=jnp.int32)
    row_inside = row < size if size % config.tile else None
    token_inside = token < num_tokens if num_tokens % config.tokens else None
    cut = depth % BLOCK != 0 or num_blocks % (steps * config.splits) != 0 or steps * config.blocks * config.splits != num_blocks

    def load(ref, *places, masks):
        """A tile of ref; `masks` broadcast to its shape, None: all inside."""
        mask = functools.reduce(lambda a, b: a & b, [m for m in masks if m is not None]) if any(m is not None for m in masks) else None
        if mask is None:
            return plt.load(ref.at[places])
        shape = jnp.broadcast_shapes(*(jnp.shape(place) for place in places))
        return plt.load(ref.at[places], mask=jnp.broadcast_to(mask, shape), other=jnp.zeros((), ref.dtype))

    def outer(mask, axis):
        return None if mask is None else jnp.expand_dims(mask, axis)

    def tokens_by(first_column, width):
        """Columns of the tokens, [tokens, width]."""
        column = first_column + jnp.arange(width, dtype=jnp.int32)
        inside = outer(column < depth, 0) if cut else None
        return load(x_ref, token[:, None], column[None, :], masks=(outer(token_inside, 1), inside))

    all_zeros_ref = one_zero_ref if zeros_ref is None else zeros_ref
    hoisted = one_zero_ref is not None and one_zero_ref.shape[0] == 2

    def one_zero(step):
        assert one_zero_ref is not None
        return plt.load(one_zero_ref.at[step, jnp.arange(config.tile, dtype=jnp.int32)])

    one_addend = addends(one_zero(0), dtype) if hoisted else None

    def of_groups(ref, step):
        """What the groups of a step have, for each block: rows [tile]."""
        if ref is None or (ref is one_zero_ref and hoisted):
            return [[None] * parts] * config.blocks
        if ref is one_zero_ref:
            return [[one_zero(step)] * parts] * config.blocks
        if per_row:
            return [[None] * parts] * config.blocks
        last = ref.shape[0] - 1
        first = (split * steps + step) * config.blocks
        # A step too many repeats the last group: its tokens are zero.
        return [
            [load(ref, jnp.minimum(((first + b) * BLOCK) // group + p, last), row, masks=(row_inside,)) for p in range(parts)]
            for b in range(config.blocks)
        ]

    def tiles(block, part, zeros):
        """16-bit numbers of the weight with their columns' first: a group's share of a block."""
        if four_bit:
            place = jnp.minimum(block, codes_ref.shape[0] - 1) if cut else block
            word = jnp.arange(codes_ref.shape[2], dtype=jnp.int32)
            words = load(codes_ref, place, row[:, None], word[None, :], masks=(outer(row_inside, 1),))
            for plane in range(part * 4 // parts, (part + 1) * 4 // parts):
                if values is not None:
                    numbers = table_numbers(words, plane, values, dtype, interpret)
                else:
                    added = one_addend if zeros is None else addends(zeros, dtype)
                    assert added is not None
                    numbers = four_bit_numbers(words, plane, added, interpret)
                yield numbers, block * BLOCK + 32 * plane
        else:
            width = BLOCK // parts
            first = block * BLOCK + part * width
            column = first + jnp.arange(width, dtype=jnp.int32)
            inside = outer(column < depth, 0) if cut else None
            codes = load(codes_ref, row[:, None], column[None, :], masks=(outer(row_inside, 1), inside))
            yield eight_bit_numbers(codes, dtype, interpret), first

    def step(i, carry):
        total, scales, zeros = carry
        # One step ahead: Triton pipelines only the loads that feed a product.
        following = of_groups(scales_ref, i + 1), of_groups(all_zeros_ref, i + 1)
        for b in range(config.blocks):
            block = (split * steps + i) * config.blocks + b
            for part in range(parts):
                partial = total if per_row else None
                for numbers, first_column in tiles(block, part, zeros[b][part]):
                    product = plt.dot(numbers, tokens_by(first_column, numbers.shape[1]).T)
                    partial = product if partial is None else partial + product
                total = partial if per_row else total + partial * scales[b][part].astype(jnp.float32)[:, None]
        return total, *following

    total = jnp.zeros((config.tile, config.tokens), jnp.float32)
    total, *_ = lax.fori_loop(0, steps, step, (total, of_groups(scales_ref, 0), of_groups(all_zeros_ref, 0)))
    if per_row:
        total = total * load(scales_ref, 0, row, masks=(row_inside,)).astype(jnp.float32)[:, None]
    masks = [outer(token_inside, 0), outer(row_inside, 1)]
    mask = functools.reduce(lambda a, b: a & b, [m for m in masks if m is not None]) if any(m is not None for m in masks) else None
    mask = None if mask is None else jnp.broadcast_to(mask, total.shape)
    plt.store(out_ref.at[split, token[None, :], row[:, None]], total.astype(out_ref.dtype), mask=mask)
