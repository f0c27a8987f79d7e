"""Dividing a decode step into items, on the device, from the lengths.

An item is a run of KV blocks of one (row, KV head) pair, and one program's work. Pairs are cut into equal items so that there are about
as many as the device runs programs at once, and no more where that can be had: programs that wait for others leave the memory idle when
these end. Where it cannot be had the items are smaller, so that the wait is short. Many rows of one length are not cut at all; one long row
is cut into enough items to keep the device busy, but not into so many that adding up their results takes longer than the items.
The items of a row's KV heads over the same tokens stand side by side: they read neighbouring memory.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeItem:
    """One item; int32 scalars.

    Attributes:
        row, head: the pair.
        begin, end: tokens [begin, end) of the row; none for a padding row. `begin` is the start of a block.
        visible: first token of the row that its window sees.
        split, num_splits: the item is the one numbered `split` of `num_splits` of its pair; num_splits is 0 where there is no item.
    """

    row: jax.Array
    head: jax.Array
    begin: jax.Array
    end: jax.Array
    visible: jax.Array
    split: jax.Array
    num_splits: jax.Array


def make_arrivals(num_rows: int, num_kv_heads: int) -> jax.Ref:
    """Counters, int32 [R * KH], of the items done of each pair; zeros before and after each layer. One for all layers of a step."""
    return jax.new_ref(jnp.zeros((num_rows * num_kv_heads,), jnp.int32))


NUM_FIELDS = 8  # int32 of an item in a plan, the last one unused: 32 bytes, one sector of memory
AT_ONCE = (8, 7, 6, 5, 4)  # eighths of the programs run at once that a plan aims at in turn, until rounding up makes it no more than all
IN_TURN = 16  # what it aims at where none of them comes true, so that the last to begin are short
MANY_IN_TURN = 32  # the same where the pairs alone are more than run at once


def plan_items(kv_lens: jax.Array, *, num_kv_heads: int, block_kv: int, window: int | None, num_programs: int) -> jax.Array:
    """Cut a decode step into items.

    Args:
        kv_lens: int32 [R], 0 for a padding row, which has one empty item for each KV head.
        num_programs: as many as the device runs at once.

    Returns:
        int32 [items at most, NUM_FIELDS], the fields of a DecodeItem in their order. The items of a pair are `num_kv_heads` apart.
    """
    num_rows = kv_lens.shape[0]
    num_pairs = num_rows * num_kv_heads
    if num_pairs > num_programs:
        aims = (MANY_IN_TURN,)
    elif 2 * num_pairs > num_programs:
        aims = (*AT_ONCE, IN_TURN)
    else:
        aims = AT_ONCE  # the last comes true: half the programs, and no more than one of each pair by rounding up
    wanted = [max(1, num_programs * eighths // 8) for eighths in aims]
    most_items = num_programs if aims == AT_ONCE else wanted[-1] + num_pairs
    visible = jnp.zeros_like(kv_lens) if window is None else jnp.maximum(kv_lens - window, 0)
    first_blocks = visible // block_kv
    blocks = (kv_lens + block_kv - 1) // block_kv - first_blocks
    total = jnp.sum(blocks, dtype=jnp.int32) * num_kv_heads
    item_blocks = (total + jnp.asarray(wanted, jnp.int32) - 1) // jnp.asarray(wanted, jnp.int32)
    # Adding up a partial result takes as long as reading 10 tokens: the time of both is least at sqrt(tokens / 10) items.
    most_splits = jnp.ceil(jnp.sqrt((blocks * block_kv).astype(jnp.float32)) / 3).astype(jnp.int32)
    least_blocks = (blocks + most_splits - 1) // jnp.maximum(most_splits, 1)
    size = jnp.maximum(jnp.maximum(item_blocks[:, None], least_blocks[None, :]), 1)  # of a row's items [aims, R]
    splits = jnp.maximum((blocks[None, :] + size - 1) // size, 1)
    row = jnp.arange(num_rows + 1, dtype=jnp.int32)
    before = row[None, :-1] < row[:, None]
    starts = jnp.sum(jnp.where(before[None], splits[:, None, :], 0), axis=2, dtype=jnp.int32) * num_kv_heads  # [aims, R + 1]
    chosen = starts[-1], splits[-1]
    for aim in reversed(range(len(aims) - 1)):
        comes_true = starts[aim, -1] <= num_programs
        chosen = jnp.where(comes_true, starts[aim], chosen[0]), jnp.where(comes_true, splits[aim], chosen[1])
    starts, splits = chosen

    item = jnp.arange(most_items, dtype=jnp.int32)
    rows = jnp.minimum(jnp.sum(starts[None, 1:] <= item[:, None], axis=1, dtype=jnp.int32), num_rows - 1)
    place, num_splits = item - starts[rows], splits[rows]
    split, head = place // num_kv_heads, place % num_kv_heads
    begin = (first_blocks[rows] + split * blocks[rows] // num_splits) * block_kv
    end = jnp.minimum((first_blocks[rows] + (split + 1) * blocks[rows] // num_splits) * block_kv, kv_lens[rows])
    num_splits = jnp.where(item < starts[-1], num_splits, 0)
    return jnp.stack([rows, head, begin, end, visible[rows], split, num_splits, jnp.zeros_like(item)], axis=1)
