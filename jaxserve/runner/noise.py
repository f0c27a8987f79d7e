"""Exponential noise that is a pure function of (seed, position, token id).

No key is split and no state advances, so a row draws the same noise whatever its bucket, slot or neighbours, and a shard of the
vocabulary draws what the whole would.
"""

import jax
import jax.numpy as jnp

_ROTATIONS = (13, 15, 26, 6, 17, 29, 16, 24)
_PARITY = 0x1BD11BDA
_ROUNDS = 13


def threefry(key: tuple[jax.Array, jax.Array], counter: tuple[jax.Array, jax.Array], rounds: int = _ROUNDS) -> tuple[jax.Array, jax.Array]:
    """Threefry-2x32 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"); 13 rounds are the fewest that pass BigCrush.

    Args:
        key, counter: two uint32 words each, of shapes that broadcast.
        rounds: 20 gives the published test vectors' variant.

    Returns:
        Two uint32 words of the broadcast shape.
    """
    keys = (key[0], key[1], key[0] ^ key[1] ^ jnp.uint32(_PARITY))
    x, y = counter[0] + keys[0], counter[1] + keys[1]
    for i in range(rounds):
        rotation = _ROTATIONS[i % 8]
        x = x + y
        y = (y << jnp.uint32(rotation)) | (y >> jnp.uint32(32 - rotation))
        y = x ^ y
        if i % 4 == 3:
            j = i // 4 + 1
            x, y = x + keys[j % 3], y + keys[(j + 1) % 3] + jnp.uint32(j)
    return x, y


def exponential_noise(seed_low: jax.Array, seed_high: jax.Array, positions: jax.Array, token_ids: jax.Array) -> jax.Array:
    """Standard exponential variates, one a row and token.

    The uniform behind it has 32 bits and its small end maps to small variates at full float precision: rare tokens keep their share.

    Args:
        seed_low, seed_high: uint32 [R], the two halves of each row's seed.
        positions: int32 [R], the position that the row samples.
        token_ids: int32 [V].

    Returns:
        float32 [R, V], in (0, inf].
    """
    words, _ = threefry(
        (seed_low[:, None], seed_high[:, None]), (token_ids[None, :].astype(jnp.uint32), positions[:, None].astype(jnp.uint32))
    )
    uniform = (words.astype(jnp.float32) + jnp.float32(0.5)) * jnp.float32(2.0**-32)
    return -jnp.log1p(-uniform)
