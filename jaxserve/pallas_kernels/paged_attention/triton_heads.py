"""Heads of a projection, read and rotated inside a Pallas-Triton kernel, as `rotate_and_write_kv` does it in a pass of its own."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxserve.pallas_kernels.float16 import narrowed
from jaxserve.pallas_kernels.projected import Projected


def head_lanes(head_dim: int) -> jax.Array:
    """int32 [1, lanes]: the elements of a head. Tiles are powers of two: a size that is none is padded by repeating the last element."""
    lane = jnp.arange(pl.next_power_of_2(head_dim), dtype=jnp.int32)[None, :]
    return lane if lane.size == head_dim else jnp.minimum(lane, head_dim - 1)


def read_heads(projected: Projected, token: jax.Array, head: jax.Array, lane: jax.Array, head_dim: int) -> jax.Array:
    """Elements `lane`, int32 [1, lanes], of heads, int32 [G, 1], of a token: [G, lanes] in the dtype of queries, with the bias."""
    where = head * head_dim + lane
    x = projected.parts[jnp.int32(0), token, where]
    if projected.parts.shape[0] > 1:
        x = x.astype(jnp.float32)
        for part in range(1, projected.parts.shape[0]):
            x = x + projected.parts[jnp.int32(part), token, where].astype(jnp.float32)
    x = narrowed(x, projected.dtype)
    if projected.bias is None:
        return x
    return narrowed(x.astype(jnp.float32) + projected.bias[where].astype(jnp.float32), projected.dtype)


def rotated_heads(projected: Projected, token: jax.Array, head: jax.Array, head_dim: int, norm: jax.Array | None) -> jax.Array:
    """Query or key heads, int32 [G, 1], of a token, normalised and rotated: float32 [G, lanes], not yet rounded.

    Args:
        norm: weight [D] of their norm, or None.
    """
    half, lane = head_dim // 2, head_lanes(head_dim)
    lanes = lane, (lane + half) % head_dim  # an element, and that with which it is turned
    pair = [read_heads(projected, token, head, at, head_dim).astype(jnp.float32) for at in lanes]
    if norm is not None:
        squares = pair[0] * pair[0]
        if lane.size != head_dim:
            squares = jnp.where(jnp.arange(lane.size, dtype=jnp.int32)[None, :] < head_dim, squares, jnp.float32(0))
        scale = lax.rsqrt(jnp.sum(squares, axis=1, keepdims=True) / head_dim + projected.eps)
        pair = [
            ((x * scale).astype(projected.dtype) * norm[at].astype(projected.dtype)).astype(jnp.float32)
            for x, at in zip(pair, lanes, strict=True)
        ]
    own, other = pair
    cos, sin = (angles[token, 0, lane % half] for angles in (projected.cos, projected.sin))
    return own * cos + jnp.where(lane < half, -other, other) * sin
