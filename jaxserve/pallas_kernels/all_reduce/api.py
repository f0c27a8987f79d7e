"""Sums over the shards of a mesh axis, and what they have side by side, whoever computes them; to be traced inside `jax.shard_map`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels.add_rms_norm import add_rms_norm
from jaxserve.pallas_kernels.all_reduce.exchange import BLOCKS, ExchangeLayout
from jaxserve.pallas_kernels.all_reduce.reference import sum_in_order
from jaxserve.pallas_kernels.matmul import add_parts

# Most bytes of a sum over peer memory, by the number of shards (the next larger one counts): in one shot, each device sending its part to
# all others, and in all; larger ones are made in two shots, and by XLA. Of two shards by benchmarks.all_reduce, where the kernel wins up to
# 16 MB; guesses for more of them.
MOST_BYTES_IN_ONE_SHOT = {2: 2**30, 4: 2**20, 8: 2**18}
MOST_BYTES = {2: 16 * 2**20, 4: 8 * 2**20, 8: 8 * 2**20}
# Most rows that are normalised in the kernel that adds them up, a block each.
MOST_ROWS = 2 * BLOCKS


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Shards:
    """How the shards of a mesh axis add up what each has a part of.

    Attributes:
        peers: the local row of `peers_table`, uint32 [1, shards + 1, 2], where the devices can read each other's memory; else None.
        axis: static; of the mesh.
        deterministic: static; as in AttentionMetadata.
    """

    peers: jax.Array | None = None
    axis: str = field(default="tensor", metadata={"static": True})
    deterministic: bool = field(default=False, metadata={"static": True})

    @property
    def count(self) -> int:
        """Known while tracing."""
        return jax.lax.axis_size(self.axis)

    def route(self, num_bytes: int) -> Literal["one shot", "two shots", "xla"]:
        """Who adds up so many bytes; the one place where that is decided."""
        if self.peers is None or num_bytes > self._most(MOST_BYTES):
            return "xla"
        return "one shot" if num_bytes <= self._most(MOST_BYTES_IN_ONE_SHOT) else "two shots"

    def _most(self, table: Mapping[int, int]) -> int:
        return next(most for shards, most in table.items() if self.count <= shards)


def all_reduce(parts: jax.Array, dtype: Any, shards: Shards) -> jax.Array:
    """Add up all shards' parts.

    Args:
        parts: [T, N] or parts of it [P, T, N] as `matmul_parts` gives them, in dtype or float32. They are added up in float32 and rounded.
        dtype: of the result.

    Returns:
        [T, N], the same bits on every shard. Where the kernel or `deterministic` adds up: in float32, in the order of the shards.
    """
    if shards.count == 1:
        return add_parts(parts, dtype)
    num_tokens, size = parts.shape[-2:]
    route = shards.route(num_tokens * size * jnp.dtype(dtype).itemsize)
    if shards.peers is not None and route != "xla":
        # Pallas takes over a second to import: not where there is no GPU.
        from jaxserve.pallas_kernels.all_reduce.triton import AllReduceConfig, all_reduce_triton, all_reduce_two_shot_triton

        flat = parts.reshape(1, -1, num_tokens * size)
        if route == "two shots":
            return all_reduce_two_shot_triton(flat, shards.peers, dtype).reshape(num_tokens, size)
        config = AllReduceConfig.for_elements(num_tokens * size, dtype, ExchangeLayout.of(shards.count))
        return all_reduce_triton(flat, shards.peers, dtype, config=config).reshape(num_tokens, size)
    whole = add_parts(parts, dtype)
    return sum_in_order(whole, shards.axis) if shards.deterministic else jax.lax.psum(whole, shards.axis)


def all_gather(part: jax.Array, shards: Shards) -> jax.Array:
    """What each shard has, [shards, ...] of their [...] of a 32-bit dtype, the same on every shard; meant for little.

    A word of ones alone, such as the integer -1, may arrive as 0x7FFFFFFF.
    """
    if shards.peers is None:
        return jax.lax.all_gather(part, shards.axis)
    from jaxserve.pallas_kernels.all_reduce.triton import all_gather_triton

    words = jax.lax.bitcast_convert_type(part, jnp.float32).reshape(1, 1, -1)
    return jax.lax.bitcast_convert_type(all_gather_triton(words, shards.peers), part.dtype).reshape(shards.count, *part.shape)


def all_to_all(part: jax.Array, shards: Shards, wanted: jax.Array | None = None, after: jax.Array | None = None) -> jax.Array:
    """Deal out rows that are cut over the shards: row r goes to shard r % shards, whole.

    Over peer memory by a kernel, whatever their size: XLA's own would split the step's CUDA graph.

    Args:
        part: float32 [R, N], this shard's part of every row; R is a multiple of the shards.
        wanted: bool [R], the same on every shard; others need not be dealt out, and are then anything. None: all.
        after: what another sum or exchange of the program gave, where `part` does not follow from it: see exchange.py.

    Returns:
        [R / shards, shards * N], the parts side by side.
    """
    num_rows, size = part.shape
    if shards.peers is None:
        turns = part.reshape(-1, shards.count, size)
        return jax.lax.all_to_all(turns, shards.axis, 1, 1, tiled=True).reshape(-1, shards.count * size)
    from jaxserve.pallas_kernels.all_reduce.triton import all_to_all_triton

    flags = jnp.ones((num_rows,), jnp.int32) if wanted is None else wanted.astype(jnp.int32)
    return all_to_all_triton(part[None], flags, flags if after is None else after, shards.peers)[0]


def all_reduce_add_rms_norm(
    parts: jax.Array, residual: jax.Array, weight: jax.Array, eps: float, shards: Shards, dtype: jnp.dtype | None = None
) -> tuple[jax.Array, jax.Array]:
    """`add_rms_norm` of the sum that `all_reduce` gives, with the same numbers.

    Args:
        parts: as for `all_reduce`.
        residual, weight, eps, dtype: as for `add_rms_norm`.
    """
    num_tokens, size = residual.shape
    peers = None if shards.deterministic else shards.peers  # the kernel's norm adds up in another order
    if shards.count > 1 and peers is not None and num_tokens <= MOST_ROWS and shards.route(residual.nbytes) == "one shot":
        from jaxserve.pallas_kernels.all_reduce.triton import AllReduceConfig, all_reduce_add_rms_norm_triton

        config = AllReduceConfig.for_rows(size, residual.dtype, ExchangeLayout.of(shards.count))
        if config is not None:
            batch = parts.reshape(1, -1, num_tokens, size)
            normed, total = all_reduce_add_rms_norm_triton(batch, residual[None], weight, eps, peers, dtype, config=config)
            return normed[0], total[0]
    return add_rms_norm(all_reduce(parts, residual.dtype, shards), residual, weight, eps, dtype, shards.deterministic)
