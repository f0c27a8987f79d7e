"""All-reduce over peer memory in Pallas-Triton, for GPUs from sm_80 on that one process drives.

To XLA it is a plain custom call, which stays inside the captured CUDA graph; XLA's own collectives split it. One-shot: each device sends
its whole part to all others and adds up what all sent. Two-shot: each shard adds up one of as many pieces, and sends the sum to all. Either
way the parts are added up in the order of the shards, in float32, so that all devices have the same bits. The residual addition and root
mean square norm that follow can be in the same kernel, one-shot. What is only put together or dealt out (logits) goes the same way.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax._src.lib.triton import dialect as triton_dialect  # pallas.triton's own inline assembly may be copied or left out by compilers
from jax._src.pallas.triton.lowering import register_lowering
from jax.core import ShapedArray
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.extend.core import Primitive

from jaxserve.pallas_kernels.add_rms_norm.reference import weighted
from jaxserve.pallas_kernels.all_reduce.exchange import BLOCKS, THREADS, VECTOR_BYTES, ExchangeLayout, round_asm

_FEWEST_THREADS = 128
_TWO_SHOT_THREADS = 512  # what all shards are sent, and what all send, is in registers at once


@dataclass(frozen=True)
class AllReduceConfig:
    """How the kernel is cut.

    Attributes:
        threads: of a block.
        vectors: that a thread sends in a round.
    """

    threads: int
    vectors: int

    @classmethod
    def for_rows(cls, size: int, dtype: Any, layout: ExchangeLayout) -> "AllReduceConfig | None":
        """A block a row; None where a row is too long."""
        vectors = pl.next_power_of_2(size) * jnp.dtype(dtype).itemsize // VECTOR_BYTES
        threads = max(32, min(THREADS, vectors))
        each = max(1, vectors // threads)
        return cls(threads, each) if each <= layout.vectors else None

    @classmethod
    def for_elements(cls, count: int, dtype: Any, layout: ExchangeLayout) -> "AllReduceConfig":
        """As many blocks as there are, then as few vectors a thread, that one round does."""
        vectors = -(-count * jnp.dtype(dtype).itemsize // VECTOR_BYTES)
        threads = max(_FEWEST_THREADS, min(THREADS, pl.next_power_of_2(-(-vectors // BLOCKS))))
        return cls(threads, min(layout.vectors, pl.next_power_of_2(-(-vectors // (BLOCKS * threads)))))

    @classmethod
    def two_shot(cls) -> "AllReduceConfig":
        """For any number of elements."""
        return cls(_TWO_SHOT_THREADS, 1)

    def elements(self, dtype: Any) -> int:
        """Of a block in a round."""
        return self.threads * self.vectors * VECTOR_BYTES // jnp.dtype(dtype).itemsize


def all_reduce_triton(parts: jax.Array, table: jax.Array, dtype: Any, *, config: AllReduceConfig, blocks: int = BLOCKS) -> jax.Array:
    """Add up all shards' parts [S, P, M]: [S, M] in a dtype.

    Args:
        parts: of S shards that this device computes for (one, but in tests); P parts are added up in float32 and rounded, then sent.
        table: their rows of `peers_table`, uint32 [S, shards + 1, 2].
        config: the cut; all calls that use a buffer may differ in it.
        blocks: most of them.
    """
    return _call(parts, table, (), dtype, config, config.elements(dtype), None, blocks)[0]


def all_reduce_two_shot_triton(parts: jax.Array, table: jax.Array, dtype: Any, *, blocks: int = BLOCKS) -> jax.Array:
    """As `all_reduce_triton`, which moves more bytes from three shards on and waits less."""
    config = AllReduceConfig.two_shot()
    shards, _, size = parts.shape
    step = config.elements(dtype) * (table.shape[1] - 1)
    out = jax.ShapeDtypeStruct((shards, size), dtype)
    return _call_in_rounds(_two_shot_kernel, "all_reduce_two_shot", parts, table, out, config, pl.cdiv(size, step), blocks)


def all_gather_triton(part: jax.Array, table: jax.Array, *, blocks: int = BLOCKS) -> jax.Array:
    """What all shards have, side by side: [S, T, shards * N] of [S, T, N] of a 32-bit dtype; S and `table` as in `all_reduce_triton`."""
    layout = ExchangeLayout.of(table.shape[1] - 1)
    shards, num_tokens, size = part.shape
    config = AllReduceConfig.for_elements(num_tokens * size, part.dtype, layout)
    num_pieces = num_tokens * pl.cdiv(size, config.elements(part.dtype))
    out = jax.ShapeDtypeStruct((shards, num_tokens, layout.shards * size), part.dtype)
    return _call_in_rounds(_all_gather_kernel, "all_gather", part, table, out, config, num_pieces, blocks)


def all_to_all_triton(part: jax.Array, wanted: jax.Array, after: jax.Array, table: jax.Array, *, blocks: int = BLOCKS) -> jax.Array:
    """Deal out rows: [S, R / shards, shards * N] of [S, R, N] of a 32-bit dtype; S and `table` as in `all_reduce_triton`.

    Args:
        part: row r goes to shard r % shards.
        wanted: int32 [R]; `shards` rows one after the other travel together, where one of them is not 0.
        after: is not read, but computed before.
    """
    config, num_shards = AllReduceConfig.two_shot(), table.shape[1] - 1
    shards, num_rows, size = part.shape
    num_pieces = num_rows // num_shards * pl.cdiv(size, config.elements(part.dtype))
    out = jax.ShapeDtypeStruct((shards, num_rows // num_shards, num_shards * size), part.dtype)
    return _call_in_rounds(_all_to_all_kernel, "all_to_all", part, table, out, config, num_pieces, blocks, wanted, after)


def _call_in_rounds(
    kernel: Callable[..., None],
    name: str,
    parts: jax.Array,
    table: jax.Array,
    out: jax.ShapeDtypeStruct,
    config: AllReduceConfig,
    num_pieces: int,
    blocks: int,
    *others: jax.Array,
) -> jax.Array:
    """Have at most so many blocks a shard do a kernel's pieces, one a block in each round."""
    num_blocks = min(num_pieces, blocks)
    return pl.pallas_call(
        functools.partial(kernel, config=config, num_rounds=pl.cdiv(num_pieces, num_blocks), num_blocks=num_blocks),
        grid=(num_blocks, out.shape[0]),
        in_specs=[pl.no_block_spec] * (2 + len(others)),
        out_specs=pl.no_block_spec,
        out_shape=out,
        compiler_params=plt.CompilerParams(num_warps=config.threads // 32, num_stages=1),
        name=name,
    )(parts, table, *others)


def all_reduce_add_rms_norm_triton(
    parts: jax.Array,
    residual: jax.Array,
    weight: jax.Array,
    eps: float,
    table: jax.Array,
    dtype: jnp.dtype | None = None,
    *,
    config: AllReduceConfig,
    blocks: int = BLOCKS,
) -> tuple[jax.Array, jax.Array]:
    """As `add_rms_norm` of all shards' parts [S, P, T, K], residual [S, T, K] and weight [K]; both results [S, T, K]."""
    shards, num_parts, num_tokens, size = parts.shape
    flat = parts.reshape(shards, num_parts, num_tokens * size)
    normed, total = _call(flat, table, (residual.reshape(shards, -1), weight), residual.dtype, config, size, eps, blocks, dtype)
    return normed.reshape(residual.shape), total.reshape(residual.shape)


def _call(
    parts: jax.Array,
    table: jax.Array,
    norm: tuple[jax.Array, ...],
    dtype: Any,
    config: AllReduceConfig,
    size: int,
    eps: float | None,
    blocks: int,
    normed_dtype: Any = None,
) -> Sequence[jax.Array]:
    num_rows = pl.cdiv(parts.shape[2], size)
    num_blocks = min(num_rows, blocks)
    dtypes = [normed_dtype or dtype, dtype] if norm else [dtype]
    return pl.pallas_call(
        functools.partial(_all_reduce_kernel, config=config, size=size, num_rows=num_rows, num_blocks=num_blocks, eps=eps),
        grid=(num_blocks, parts.shape[0]),
        in_specs=[pl.no_block_spec] * (2 + len(norm)),
        out_specs=[pl.no_block_spec] * len(dtypes),
        out_shape=[jax.ShapeDtypeStruct((parts.shape[0], parts.shape[2]), of) for of in dtypes],
        input_output_aliases={2: 1} if norm else {},
        compiler_params=plt.CompilerParams(num_warps=config.threads // 32, num_stages=1),
        name="all_reduce_add_rms_norm" if norm else "all_reduce",
    )(parts, table, *norm)


def _all_reduce_kernel(parts_ref, table_ref, *refs, config: AllReduceConfig, size: int, num_rows: int, num_blocks: int, eps: float | None):
    dtype = refs[-1].dtype
    total_size = parts_ref.shape[2]
    block, shard = pl.program_id(0), pl.program_id(1)
    layout, numbers = _read_table(table_ref, shard)
    column = jnp.arange(config.elements(dtype), dtype=jnp.int32)

    def one_round(index: Any, carry: Any) -> Any:
        row = block + jnp.int32(index) * jnp.int32(num_blocks)
        at = row * jnp.int32(size) + column
        present = (column < size) & (at < total_size)
        mine = _own_part(parts_ref, shard, at, present, dtype)
        sent = exchange([mine], block, numbers, layout, config.vectors, repeated=num_rows > num_blocks)
        branch = _add_up(sent, dtype)
        if eps is None:
            plt.store(refs[0].at[shard, at], branch, mask=present)
            return carry
        residual_ref, weight_ref, normed_ref, sum_ref = refs
        total = branch + plt.load(residual_ref.at[shard, at], mask=present, other=0.0)
        plt.store(sum_ref.at[shard, at], total, mask=present)
        wide = total.astype(jnp.float32)
        scale = lax.rsqrt(jnp.sum(wide * wide) / size + eps)
        weight = plt.load(weight_ref.at[column], mask=column < size, other=0.0)
        plt.store(normed_ref.at[shard, at], weighted(wide * scale, weight, dtype, normed_ref.dtype), mask=present)
        return carry

    _repeat(one_round, pl.cdiv(num_rows, num_blocks))


def _two_shot_kernel(parts_ref, table_ref, sum_ref, *, config: AllReduceConfig, num_rounds: int, num_blocks: int):
    dtype, size = sum_ref.dtype, sum_ref.shape[1]
    block, shard = pl.program_id(0), pl.program_id(1)
    layout, numbers = _read_table(table_ref, shard)
    piece = config.elements(dtype)
    column = jnp.arange(piece, dtype=jnp.int32)

    def two_rounds(index: Any, carry: Any) -> Any:
        row = block + jnp.int32(index) * jnp.int32(num_blocks)
        places = [(row * jnp.int32(layout.shards) + jnp.int32(i)) * jnp.int32(piece) + column for i in range(layout.shards)]
        mine = [_own_part(parts_ref, shard, at, at < size, dtype) for at in places]
        sent = exchange(mine, block, numbers, layout, config.vectors, repeated=True)
        sums = exchange([_add_up(sent, dtype)], block, numbers, layout, config.vectors, repeated=num_rounds > 1)
        for at, total in zip(places, sums, strict=True):
            plt.store(sum_ref.at[shard, at], total, mask=at < size)
        return carry

    _repeat(two_rounds, num_rounds)


def _all_gather_kernel(part_ref, table_ref, gathered_ref, *, config: AllReduceConfig, num_rounds: int, num_blocks: int):
    dtype, (_, num_tokens, size) = part_ref.dtype, part_ref.shape
    block, shard = pl.program_id(0), pl.program_id(1)
    layout, numbers = _read_table(table_ref, shard)
    elements = config.elements(dtype)
    pieces = pl.cdiv(size, elements)  # of a row

    def one_round(index: Any, carry: Any) -> Any:
        piece = block + jnp.int32(index) * jnp.int32(num_blocks)
        row = lax.div(piece, jnp.int32(pieces))
        column = (piece - row * jnp.int32(pieces)) * jnp.int32(elements) + jnp.arange(elements, dtype=jnp.int32)
        present = (column < size) & (row < num_tokens)
        mine = plt.load(part_ref.at[shard, row, column], mask=present, other=0.0)
        for i, theirs in enumerate(exchange([mine], block, numbers, layout, config.vectors, repeated=num_rounds > 1)):
            plt.store(gathered_ref.at[shard, row, jnp.int32(i * size) + column], theirs, mask=present)
        return carry

    _repeat(one_round, num_rounds)


def _all_to_all_kernel(part_ref, table_ref, wanted_ref, after_ref, dealt_ref, *, config: AllReduceConfig, num_rounds: int, num_blocks: int):
    del after_ref
    dtype, (_, num_rows, size) = part_ref.dtype, part_ref.shape
    block, shard = pl.program_id(0), pl.program_id(1)
    layout, numbers = _read_table(table_ref, shard)
    elements, num_turns = config.elements(dtype), num_rows // layout.shards
    pieces = pl.cdiv(size, elements)  # of a row

    def one_round(index: Any, carry: Any) -> Any:
        piece = block + jnp.int32(index) * jnp.int32(num_blocks)
        turn = jnp.minimum(lax.div(piece, jnp.int32(pieces)), jnp.int32(num_turns))
        column = (piece - turn * jnp.int32(pieces)) * jnp.int32(elements) + jnp.arange(elements, dtype=jnp.int32)
        rows = [jnp.minimum(turn * jnp.int32(layout.shards) + jnp.int32(i), jnp.int32(num_rows - 1)) for i in range(layout.shards)]
        wanted = functools.reduce(jnp.bitwise_or, [plt.load(wanted_ref.at[row]) for row in rows])

        # All shards know alike what is wanted, so they skip the same rounds.
        @pl.when((turn < num_turns) & (wanted != 0))
        def _():
            present = column < size
            mine = [plt.load(part_ref.at[shard, row, column], mask=present, other=0.0) for row in rows]
            for i, theirs in enumerate(exchange(mine, block, numbers, layout, config.vectors, repeated=num_rounds > 1)):
                plt.store(dealt_ref.at[shard, turn, jnp.int32(i * size) + column], theirs, mask=present)

        return carry

    _repeat(one_round, num_rounds)


def _read_table(table_ref: Any, shard: jax.Array) -> tuple[ExchangeLayout, list[jax.Array]]:
    """The layout, and the shard's index and the halves of all addresses."""
    layout = ExchangeLayout.of(table_ref.shape[1] - 1)
    numbers = [plt.load(table_ref.at[shard, jnp.int32(0), jnp.int32(0)])]
    numbers += [plt.load(table_ref.at[shard, jnp.int32(1 + i // 2), jnp.int32(i % 2)]) for i in range(2 * layout.shards)]
    return layout, numbers


def _own_part(parts_ref: Any, shard: jax.Array, at: jax.Array, present: jax.Array, dtype: Any) -> jax.Array:
    """What this shard adds, of elements `at`: its parts, added up in float32."""
    mine = plt.load(parts_ref.at[shard, jnp.int32(0), at], mask=present, other=0.0)
    if parts_ref.shape[1] > 1:
        mine = mine.astype(jnp.float32)
        for part in range(1, parts_ref.shape[1]):
            mine = mine + plt.load(parts_ref.at[shard, jnp.int32(part), at], mask=present, other=0.0).astype(jnp.float32)
    return mine.astype(dtype)


def _add_up(parts: Sequence[jax.Array], dtype: Any) -> jax.Array:
    """In the order of the shards."""
    total = parts[0].astype(jnp.float32)
    for part in parts[1:]:
        total = total + part.astype(jnp.float32)
    return total.astype(dtype)


def _repeat(one_round: Any, count: int) -> None:
    if count == 1:
        one_round(0, 0)
    else:
        lax.fori_loop(0, count, one_round, 0)


def exchange(
    mine: Sequence[jax.Array],
    block: jax.Array,
    numbers: Sequence[jax.Array],
    layout: ExchangeLayout,
    vectors: int,
    *,
    repeated: bool,
) -> Sequence[jax.Array]:
    """Inside a kernel: send to all shards, and wait for what they send, one array a shard; as `round_asm`.

    Args:
        mine: one array for all, or one for each shard.
    """
    dtype, wide = mine[0].dtype, mine[0].dtype.itemsize == 4
    bits = [lax.bitcast_convert_type(part, jnp.int32) for part in mine] if wide else mine
    sent = _exchange_p.bind(*bits, block, *numbers, layout=layout, vectors=vectors, count=len(mine), repeated=repeated)
    return [lax.bitcast_convert_type(part, dtype) for part in sent] if wide else sent


_exchange_p = Primitive("exchange")
_exchange_p.multiple_results = True


@_exchange_p.def_abstract_eval
def _exchange_abstract_eval(mine: ShapedArray, *_: ShapedArray, layout: ExchangeLayout, **__: Any) -> list[ShapedArray]:
    return [mine.update(shape=mine.shape)] * layout.shards


@register_lowering(_exchange_p)
def _exchange_lowering(ctx: Any, *values: Any, layout: ExchangeLayout, vectors: int, count: int, repeated: bool) -> list[Any]:
    mine, scalars = values[:count], values[count:]
    # A thread holds `pack` elements, no more: the array has as many as all threads' vectors.
    pack = vectors * VECTOR_BYTES // ctx.avals_in[0].dtype.itemsize
    asm, constraints = round_asm(layout, vectors, pack, scattered=count > 1, repeated=repeated)
    kind = mine[0].type
    wide = [triton_dialect.splat(_like(type(kind)(kind), scalar.type), scalar) for scalar in scalars]
    results = triton_dialect.elementwise_inline_asm(
        [kind] * layout.shards, asm, constraints=constraints, pure=False, packed_element=pack, args=[*mine, *wide]
    )
    return list(results)


def _like(tensor: Any, element: Any) -> Any:
    """A tensor type of the same shape."""
    return tensor.get(tensor.shape, element)
