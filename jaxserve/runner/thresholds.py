"""Truncation of a distribution without sorting the vocabulary: a search for the smallest threshold that covers enough weight."""

import jax
import jax.numpy as jnp

_INFINITY_BITS = 0x7F800000


def covering_threshold(distances: jax.Array, weights: jax.Array, targets: jax.Array) -> jax.Array:
    """Smallest value among a row's distances at or below which the weights sum to at least the target.

    Bisection over the bit patterns of non-negative floats, whose order as integers is their order as floats. Equal distances are in
    or out together: whoever keeps `distances <= threshold` keeps every tie.

    Args:
        distances: float32 [R, V], non-negative (no -0.0, no NaN); inf for entries that are out anyway.
        weights: float32 [R, V], non-negative.
        targets: float32 [R]; a target that is never reached gives inf.

    Returns:
        float32 [R].
    """
    keys = jax.lax.bitcast_convert_type(distances, jnp.int32)

    def halve(_, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # covers(low) is false, covers(high) is true
        middle = low + (high - low) // jnp.int32(2)
        covered = jnp.sum(jnp.where(keys <= middle[:, None], weights, jnp.float32(0)), axis=1)
        enough = covered >= targets
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    rows = distances.shape[0]
    bounds = (jnp.full((rows,), -1, jnp.int32), jnp.full((rows,), _INFINITY_BITS, jnp.int32))
    _, high = jax.lax.fori_loop(0, 31, halve, bounds)
    return jax.lax.bitcast_convert_type(high, jnp.float32)
