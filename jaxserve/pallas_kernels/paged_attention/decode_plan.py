"""Dividing the KV blocks of a decode step into equal shares, on the device, from the lengths.

The KV blocks that a step reads are laid out in one line: row after row, in a row KV head after KV head, in a head block after
block. The line is cut into as many shares as the device runs workers, equal to within one block, so that one long row and many
short ones take the same time for the same bytes (Stream-K: Osama et al., https://arxiv.org/abs/2301.03598). A worker writes
the output of a (row, KV head) whose blocks all lie in its share; of one that it shares with others, it writes a partial
result, and a second, small kernel adds the partial results up. A share begins and ends inside at most one (row, KV head) each, so a
worker writes at most two partial results: in place 0 the one it took over from the worker before it, in place 1 the one it
began and hands on.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodePlan:
    """Shares of W workers of the KV blocks of R rows; all arrays int32.

    Attributes:
        row_starts: [R + 1] where each row's blocks begin in the line of all blocks; the last entry is their number.
        first_blocks: [R] first KV block that the row's window touches.
        worker_starts: [W + 1] where each worker's share begins.
        worker_rows: [W + 1] row in which each worker's share begins.
    """

    row_starts: jax.Array
    first_blocks: jax.Array
    worker_starts: jax.Array
    worker_rows: jax.Array


def plan_decode(kv_lens: jax.Array, *, num_kv_heads: int, block_kv: int, window: int | None, num_workers: int) -> DecodePlan:
    """Cut the KV blocks of `block_kv` tokens that a decode step reads into `num_workers` shares.

    Args:
        kv_lens: int32 [R], 0 for a padding row.
    """
    first_token = jnp.zeros_like(kv_lens) if window is None else jnp.maximum(kv_lens - window, 0)
    first_blocks = first_token // block_kv
    row_blocks = ((kv_lens + block_kv - 1) // block_kv - first_blocks) * num_kv_heads
    row = jnp.arange(kv_lens.shape[0] + 1, dtype=jnp.int32)
    row_starts = jnp.sum(jnp.where(row[None, :-1] < row[:, None], row_blocks[None, :], 0), axis=1, dtype=jnp.int32)
    num_blocks = row_starts[-1]
    worker = jnp.arange(num_workers + 1, dtype=jnp.int32)
    share, larger_shares = num_blocks // num_workers, num_blocks % num_workers
    worker_starts = worker * share + jnp.minimum(worker, larger_shares)
    worker_rows = jnp.sum(row_starts[None, 1:] <= worker_starts[:, None], axis=1, dtype=jnp.int32)
    return DecodePlan(row_starts, first_blocks, worker_starts, worker_rows)


def worker_of_block(block: jax.Array, num_blocks: jax.Array, num_workers: int) -> jax.Array:
    """Worker whose share holds a block of the line (int32; the inverse of `worker_starts`)."""
    share, larger_shares = num_blocks // num_workers, num_blocks % num_workers
    boundary = larger_shares * (share + 1)
    in_smaller = larger_shares + (block - boundary) // jnp.maximum(share, 1)
    return jnp.where(block < boundary, block // (share + 1), in_smaller)
