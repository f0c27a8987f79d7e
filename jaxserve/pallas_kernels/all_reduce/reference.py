"""The sum over shards by XLA's collectives, in the order of the shards; to be traced inside `jax.shard_map`."""

import jax
import jax.numpy as jnp


def sum_in_order(y: jax.Array, axis: str) -> jax.Array:
    """The sum of the shards' y [T, N] on each of them, added up in float32 in the order of the shards.

    A ring adds up each part of an array from another shard on, so that from three shards on a token's bits would depend on its place.
    """
    shards = jax.lax.axis_size(axis)
    padded = jnp.pad(y, ((0, -y.shape[0] % shards), (0, 0))) if y.shape[0] % shards else y
    # Each shard adds up its share of the tokens: [shards, T / shards, N], one part from each.
    parts = jax.lax.all_to_all(padded.reshape(shards, -1, y.shape[1]), axis, 0, 0)
    total = parts[0].astype(jnp.float32)
    for part in parts[1:]:
        total = total + part.astype(jnp.float32)
    return jax.lax.all_gather(total.astype(y.dtype), axis, axis=0, tiled=True)[: y.shape[0]]
