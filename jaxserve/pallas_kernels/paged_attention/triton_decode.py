"""Decode attention over a paged KV cache for NVIDIA GPUs from sm_80 on, in Pallas-Triton.

One program an item of the plan (see decode_items.py): an online softmax over its KV blocks (Flash-Decoding,
https://pytorch.org/blog/flash-decoding/, with float32 partial results). Of a pair that was cut, the program that comes last adds up
the partial results of all, in their order, so that the result is the same in every run. Who comes last is told by a counter a pair, which
that program sets back to zero; the counters go from layer to layer in one array.

Where nothing else reads them, queries come as the projection gives them. Each program rotates its own, and that of a pair's last item
writes the row's new key and value before it reads them back: a kernel less a layer.
"""

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jaxserve.pallas_kernels.float16 import narrowed
from jaxserve.pallas_kernels.layer_kv import FLOAT8, LayerKV
from jaxserve.pallas_kernels.metadata import Queries
from jaxserve.pallas_kernels.paged_attention.combine import MASKED
from jaxserve.pallas_kernels.paged_attention.decode_items import NUM_FIELDS, DecodeItem, plan_items
from jaxserve.pallas_kernels.paged_attention.triton_heads import head_lanes, read_heads, rotated_heads
from jaxserve.pallas_kernels.projected import Projected


@dataclass(frozen=True)
class TritonDecodeConfig:
    """How the kernel is cut: tokens a block, warps a program, blocks in flight a program, programs that the device is to run at once.

    Of 4 warps and blocks of 32 KiB, K and V, registers allow 4 programs a multiprocessor; with two blocks in flight shared memory allows 3.
    """

    block_kv: int = 64
    num_warps: int = 4
    num_blocks: int = 1
    num_programs: int = 132 * 4

    @property
    def num_stages(self) -> int:
        """What Triton is to be told: it halves its stages between the loads of page numbers and those of pages."""
        return 2 * self.num_blocks + 1

    @classmethod
    def suited(cls, q: Queries, kv: LayerKV, num_multiprocessors: int) -> "TritonDecodeConfig":
        """The cut measured best on an H200 (docs/performance_gpu.md) for q [R, H, D]."""
        num_pairs = q.shape[0] * kv[0].shape[1]
        block_kv = max(16, min(128, 64 * 128 // pl.next_power_of_2(q.shape[2])))
        if kv[0].dtype in FLOAT8:
            return cls(block_kv, 1, 1, 8 * num_multiprocessors)
        if num_pairs <= 2 * num_multiprocessors:
            return cls(block_kv, 4, 2, (2 if num_pairs <= num_multiprocessors else 3) * num_multiprocessors)
        return cls(block_kv, 4, 1, 4 * num_multiprocessors)

    def plan(self, kv_lens: jax.Array, num_kv_heads: int, window: int | None) -> jax.Array:
        """The items of a step, as `plan_items`."""
        return plan_items(kv_lens, num_kv_heads=num_kv_heads, block_kv=self.block_kv, window=window, num_programs=self.num_programs)


def soft_capped(scores: jax.Array, soft_cap: float | None, unit: float) -> jax.Array:
    """soft_cap * tanh(scores * unit / soft_cap), or scores * unit without a cap, times log2(e): what exp2 takes."""
    if soft_cap is None:
        return scores * (unit * math.log2(math.e))
    doubled = jnp.exp2(scores * (unit / soft_cap * 2 * math.log2(math.e)))
    return (1 - 2 / (doubled + 1)) * (soft_cap * math.log2(math.e))


@functools.partial(jax.jit, static_argnames=("scale", "window", "soft_cap", "config", "out_dtype", "interpret"))
def decode_attention_triton(
    q: jax.Array | Projected,
    kv: LayerKV,
    page_table: jax.Array,
    kv_lens: jax.Array,
    *,
    items: jax.Array | None = None,
    arrivals: jax.Ref | None = None,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    config: TritonDecodeConfig,
    out_dtype: jnp.dtype | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, LayerKV]:
    """Attention of one token a row: q [R, H, D], page_table int32 [R, P], kv_lens int32 [R] -> [R, H, D]; zeros for a padding row.

    A float8 cache is read as float16, which holds every float8 value (Triton converts one to the other in half an instruction).

    Args:
        q: queries, or the projection that they are still to be made of, one token a row, with the keys and values to be stored.
        items: from `plan_items` with the config's numbers; None: made for this call.
        arrivals: from `make_arrivals`; None: made for this call.
        out_dtype: of the result; None: q's.

    Returns:
        The result, and the pages: with what was projected in them.
    """
    is_projected = isinstance(q, Projected)
    num_rows, num_heads, head_dim = (q.queries(kv) if is_projected else q).shape
    num_kv_heads = kv[0].shape[1]
    group = num_heads // num_kv_heads
    if items is None:
        items = config.plan(kv_lens, num_kv_heads, window)
    kernel = functools.partial(_decode_kernel, scale=scale, window=window, soft_cap=soft_cap, config=config, interpret=interpret)
    partials = items.shape[0], group
    counts = jnp.zeros((num_rows * num_kv_heads,), jnp.int32) if arrivals is None else arrivals[...]
    operands = q if is_projected else q.reshape(num_rows, num_kv_heads, group, head_dim), *kv, page_table, items, counts
    pages = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in kv) if is_projected else ()
    before = len(jax.tree.leaves(operands)) - 5  # of the pages, the table, the items and the counts
    out, _, _, _, counts, *written = pl.pallas_call(
        kernel,
        grid=(items.shape[0],),
        in_specs=jax.tree.map(lambda _: pl.no_block_spec, operands),
        out_specs=(pl.no_block_spec,) * (5 + len(pages)),
        out_shape=(
            jax.ShapeDtypeStruct((num_rows, num_kv_heads, group, head_dim), out_dtype or q.dtype),
            jax.ShapeDtypeStruct((*partials, head_dim), jnp.float32),
            jax.ShapeDtypeStruct(partials, jnp.float32),
            jax.ShapeDtypeStruct(partials, jnp.float32),
            jax.ShapeDtypeStruct(counts.shape, counts.dtype),
            *pages,
        ),
        input_output_aliases={before + 4: 4} | ({before: 5, before + 1: 6} if is_projected else {}),
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=interpret,
        name="paged_decode",
    )(*operands)
    if arrivals is not None:
        arrivals[...] = counts
    return out.reshape(num_rows, num_heads, head_dim), tuple(written) if is_projected else kv


def padded_lanes(size: int):
    """How to index the last axis of `size` elements, and the axes beside it.

    Tiles are powers of two: a size that is none is padded by repeating the last element, so that what the surplus reads is valid, and
    what it writes is the same value again.

    Returns:
        The index of the last axis, and a function from the indices of a tile's rows to the indices that go with it.
    """
    padded = pl.next_power_of_2(size)
    if padded == size:
        return slice(None), lambda rows: rows
    return jnp.minimum(jnp.arange(padded, dtype=jnp.int32), size - 1)[None, :], lambda rows: rows[:, None]


def _decode_kernel(
    q_ref, keys_ref, values_ref, table_ref, items_ref, zeros_ref, out_ref, sums_ref, maxima_ref, weights_ref, arrivals_ref, *written_refs,
    scale: float, window: int | None, soft_cap: float | None, config: TritonDecodeConfig, interpret: bool,
):  # fmt: skip
    del zeros_ref  # the same memory as arrivals_ref
    if written_refs:
        keys_ref, values_ref = written_refs  # the same memory
    _, num_kv_heads, group, head_dim = out_ref.shape
    page_size, block_kv = keys_ref.shape[2], config.block_kv
    group_lanes = jnp.minimum(jnp.arange(max(16, pl.next_power_of_2(group)), dtype=jnp.int32), group - 1)
    padded_dim = pl.next_power_of_2(head_dim)
    dim, column = padded_lanes(head_dim)
    place = pl.program_id(0)
    item = DecodeItem(*(items_ref[place, i] for i in range(NUM_FIELDS - 1)))

    def store(ref, index, value):
        """Write what belongs to query heads; the surplus lanes of a tile repeat the last head."""
        value = value.astype(ref.dtype)
        if interpret or group_lanes.size == group:  # the interpreter knows no masks, and writes the same value again
            ref[index] = value
        else:
            present = jnp.arange(group_lanes.size, dtype=jnp.int32) < group
            plt.store(ref.at[index], value, mask=present if value.ndim == 1 else jnp.broadcast_to(present[:, None], value.shape))

    def queries():
        if not isinstance(q_ref, Projected):
            return q_ref[item.row, item.head, column(group_lanes), dim]
        norm = None if q_ref.norms is None else q_ref.norms[0]
        q = rotated_heads(q_ref, item.row, (item.head * group + group_lanes)[:, None], head_dim, norm)
        if q_ref.scales is not None:
            q = q * q_ref.scales[0][item.head]
        return narrowed(q, q_ref.dtype)

    def write_token(projected: Projected):
        """Store the key and the value of the pair's token."""
        page, offset = projected.write_pages[item.row], projected.write_offsets[item.row]
        one, num_heads = jnp.zeros((1, 1), jnp.int32), num_kv_heads * group
        lane = head_lanes(head_dim)
        norm = None if projected.norms is None else projected.norms[1]
        key = narrowed(rotated_heads(projected, item.row, one + (num_heads + item.head), head_dim, norm), projected.dtype)
        value = read_heads(projected, item.row, one + (num_heads + num_kv_heads + item.head), lane, head_dim)
        for ref, x, at in (keys_ref, key, 0), (values_ref, value, 1):
            if projected.scales is not None:
                x = x.astype(jnp.float32) / projected.scales[at][item.head]

            @pl.when(page < ref.shape[0])
            def _(ref=ref, x=x):
                ref[page, item.head, offset, lane] = x.astype(ref.dtype)

        if not interpret:
            plt.debug_barrier()  # before any warp reads them

    def attend():
        """Online softmax over the item's blocks: weighted values, maxima and weights of its query heads."""
        q, unit = queries(), scale
        if padded_dim != head_dim:
            q = jnp.where(jnp.arange(padded_dim, dtype=jnp.int32)[None, :] < head_dim, q, jnp.zeros_like(q))
        if keys_ref.dtype in FLOAT8:
            q, unit = (q.astype(jnp.float32) * scale).astype(jnp.float16), 1.0

        def block(i, carry):
            total, maximum, weight = carry
            token = item.begin + i * block_kv + jnp.arange(block_kv, dtype=jnp.int32)
            page = table_ref[item.row, jnp.minimum(token, item.end - 1) // page_size]
            where = column(page), item.head, column(token % page_size), dim
            keys = keys_ref[where].astype(q.dtype)
            scores = soft_capped(plt.dot(q, keys.T), soft_cap, unit)
            visible = token < item.end
            if window is not None:
                visible &= token >= item.visible
            scores = jnp.where(visible[None, :], scores, MASKED)
            new_maximum = jnp.maximum(maximum, scores.max(axis=1))
            decay = jnp.exp2(maximum - new_maximum)
            exponentials = jnp.exp2(scores - new_maximum[:, None])
            values = values_ref[where].astype(q.dtype)
            total = total * decay[:, None] + plt.dot(exponentials.astype(q.dtype), values)
            return total, new_maximum, weight * decay + exponentials.sum(axis=1)

        nothing = (
            jnp.zeros((group_lanes.size, padded_dim), jnp.float32),
            jnp.full((group_lanes.size,), MASKED, jnp.float32),
            jnp.zeros((group_lanes.size,), jnp.float32),
        )
        return lax.fori_loop(0, pl.cdiv(item.end - item.begin, block_kv), block, nothing)

    def add_up():
        """Attention [G, D] from the partial results of the pair's items."""
        member = jnp.minimum(jnp.arange(pl.next_power_of_2(group), dtype=jnp.int32), group - 1)
        splits = max(1, 2048 * config.num_warps // (member.size * padded_dim))  # read at once: 64 registers a thread
        first = place - item.split * num_kv_heads

        def add(i, carry):
            total, maximum, weight = carry
            split = i * splits + jnp.arange(splits, dtype=jnp.int32)
            places = first + jnp.minimum(split, item.num_splits - 1) * num_kv_heads
            present = (split < item.num_splits)[:, None]
            pair = places[:, None], member[None, :]
            sums = sums_ref[(*pair, dim) if isinstance(dim, slice) else (*(index[:, :, None] for index in pair), dim[None])]
            maxima = jnp.where(present, maxima_ref[pair], MASKED)
            weights = weights_ref[pair]
            new_maximum = jnp.maximum(maximum, maxima.max(axis=0))
            share = jnp.where(present, jnp.exp2(maxima - new_maximum[None, :]), 0.0)
            decay = jnp.exp2(maximum - new_maximum)
            total = total * decay[:, None] + (sums * share[:, :, None]).sum(axis=0)
            return total, new_maximum, weight * decay + (weights * share).sum(axis=0)

        nothing = (
            jnp.zeros((member.size, padded_dim), jnp.float32),
            jnp.full((member.size,), MASKED, jnp.float32),
            jnp.zeros((member.size,), jnp.float32),
        )
        total, _, weight = lax.fori_loop(0, pl.cdiv(item.num_splits, splits), add, nothing)
        out_ref[item.row, item.head, column(member), dim] = (total / jnp.maximum(weight, 1e-30)[:, None]).astype(out_ref.dtype)

    @pl.when(item.num_splits > 0)
    def _():
        if isinstance(q_ref, Projected):
            pl.when(item.split == item.num_splits - 1)(lambda: write_token(q_ref))
        total, maximum, weight = attend()

        @pl.when(item.num_splits == 1)
        def _():
            store(out_ref, (item.row, item.head, column(group_lanes), dim), total / jnp.maximum(weight, 1e-30)[:, None])

        @pl.when(item.num_splits > 1)
        def _():
            store(sums_ref, (place, column(group_lanes), dim), total)
            store(maxima_ref, (place, group_lanes), maximum)
            store(weights_ref, (place, group_lanes), weight)
            if not interpret:
                plt.debug_barrier()  # all warps have written before one of them releases
            pair = item.row * num_kv_heads + item.head
            arrived = plt.atomic_add(arrivals_ref, pair, jnp.int32(1))  # of the acquire-release kind, for the whole GPU

            @pl.when(arrived == item.num_splits - 1)
            def _():
                add_up()
                arrivals_ref[pair] = jnp.int32(0)
