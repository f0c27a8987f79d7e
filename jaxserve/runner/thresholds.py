"""Search instead of sort: the smallest threshold that covers enough weight, and the part of a vocabulary where it lies."""

import jax
import jax.numpy as jnp

_INFINITY_BITS = 0x7F800000


def covering_threshold(distances: jax.Array, weights: jax.Array, targets: jax.Array, wanted: jax.Array) -> jax.Array:
    """Smallest value among a row's distances at or below which the weights sum to at least the target.

    Bisection over the bit patterns of non-negative floats, whose order as integers is their order as floats. Equal distances are in
    or out together: whoever keeps `distances <= threshold` keeps every tie.

    Args:
        distances: float32 [R, M], non-negative (no -0.0, no NaN); inf for entries that are out anyway.
        weights: float32 [R, M], non-negative.
        targets: float32 [R]; a target that is never reached gives inf.
        wanted: bool [R]; the other rows give inf, and if no row is wanted the search costs nothing.

    Returns:
        float32 [R].
    """
    keys = jax.lax.bitcast_convert_type(distances, jnp.int32)

    def halve(_, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # low does not cover the target, high does or is infinite
        middle = low + (high - low) // jnp.int32(2)
        covered = jnp.sum(jnp.where(keys <= middle[:, None], weights, jnp.float32(0)), axis=1)
        enough = covered >= targets
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    rows = distances.shape[0]
    bounds = (jnp.full((rows,), -1, jnp.int32), jnp.full((rows,), _INFINITY_BITS, jnp.int32))
    steps = jnp.where(jnp.any(wanted), jnp.int32(31), jnp.int32(0))
    _, high = jax.lax.fori_loop(jnp.int32(0), steps, halve, bounds)
    return jnp.where(wanted, jax.lax.bitcast_convert_type(high, jnp.float32), jnp.inf)


def nearest(distances: jax.Array, block: int, count: int) -> tuple[jax.Array, jax.Array]:
    """The blocks of a row with the smallest distances.

    Args:
        distances: float32 [R, V].
        block: entries a block.
        count: how many blocks; fewer than there are.

    Returns:
        float32 [R, count * block], their entries in no particular order (the last block filled up with inf);
        float32 [R], the smallest distance that is not among them.
    """
    rows, size = distances.shape
    padding = jnp.full((rows, -size % block), jnp.inf, jnp.float32)
    blocks = jnp.concatenate([distances, padding], axis=1).reshape(rows, -1, block)
    closest, places = jax.lax.top_k(-jnp.min(blocks, axis=2), count + 1)
    taken = jnp.take_along_axis(blocks, places[:, :count, None], axis=1, mode="promise_in_bounds")
    return taken.reshape(rows, count * block), -closest[:, count]
