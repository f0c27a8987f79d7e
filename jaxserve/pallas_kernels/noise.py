"""Exponential noise that is a pure function of (seed, position, token id).

No key is split and no state advances, so a row draws the same noise whatever its bucket, slot or neighbours, and a shard of the
vocabulary draws what the whole would. Seed and position give a row its 64-bit key by a strong generator; token ids are then hashed
under that key, which is several times cheaper than running the generator once a token.
"""

import jax
import jax.numpy as jnp

_ROTATIONS = (13, 15, 26, 6, 17, 29, 16, 24)
_PARITY = 0x1BD11BDA
_ROUNDS = 20
_GREEN_KEY = 15485863


def threefry(key: tuple[jax.Array, jax.Array], counter: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Threefry-2x32 with 20 rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

    Args:
        key, counter: two uint32 words each, of one shape.

    Returns:
        Two uint32 words of that shape.
    """
    keys = (key[0], key[1], key[0] ^ key[1] ^ jnp.uint32(_PARITY))
    x, y = counter[0] + keys[0], counter[1] + keys[1]
    for i in range(_ROUNDS):
        rotation = _ROTATIONS[i % 8]
        x = x + y
        y = x ^ ((y << jnp.uint32(rotation)) | (y >> jnp.uint32(32 - rotation)))
        if i % 4 == 3:
            j = i // 4 + 1
            x, y = x + keys[j % 3], y + keys[(j + 1) % 3] + jnp.uint32(j)
    return x, y


def hash_tokens(key: tuple[jax.Array, jax.Array], token_ids: jax.Array) -> jax.Array:
    """A keyed hash of token ids: three rounds of multiply and shift with the constants of triple32, whose output bits each depend on
    every input bit almost without bias (Wellons, nullprogram.com/blog/2018/07/31). One key word goes in first, the other between.

    Args:
        key: two uint32 words [R].
        token_ids: int32 [V], the same for all rows, or [R, V].

    Returns:
        uint32 [R, V].
    """
    word = (token_ids if token_ids.ndim == 2 else token_ids[None, :]).astype(jnp.uint32) + key[0][:, None]
    word = (word ^ (word >> jnp.uint32(17))) * jnp.uint32(0xED5AD4BB)
    word = word ^ key[1][:, None]
    word = (word ^ (word >> jnp.uint32(11))) * jnp.uint32(0xAC4C1B51)
    word = (word ^ (word >> jnp.uint32(15))) * jnp.uint32(0x31848BAB)
    return word ^ (word >> jnp.uint32(14))


def noise_keys(seed_low: jax.Array, seed_high: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The key under which a row hashes its tokens.

    Args:
        seed_low, seed_high: uint32 [R], the two halves of each row's seed.
        positions: int32 [R], the position that the row samples.

    Returns:
        Two uint32 words [R].
    """
    positions = positions.astype(jnp.uint32)
    return threefry((seed_low, seed_high), (positions, jnp.zeros_like(positions)))


def uniform_noise(keys: tuple[jax.Array, jax.Array], token_ids: jax.Array) -> jax.Array:
    """Variates uniform in (0, 1), one a row and token: of keys uint32 [R] and token ids int32 [V] or [R, V], float32 [R, V]."""
    return (hash_tokens(keys, token_ids).astype(jnp.float32) + jnp.float32(0.5)) * jnp.float32(2.0**-32)


def is_green(previous: jax.Array, token_ids: jax.Array, share: jax.Array) -> jax.Array:
    """Whether tokens are on the green list that the token before them draws (Kirchenbauer et al. 2023, arXiv 2301.10226).

    Args:
        previous: int32 [R].
        token_ids: int32 [V], the same for all rows, or [R, V].
        share: float32 [R], of the vocabulary that is green.

    Returns:
        bool [R, V].
    """
    words = previous.astype(jnp.uint32) * jnp.uint32(_GREEN_KEY)
    return uniform_noise((words, jnp.full_like(words, _GREEN_KEY)), token_ids) < share[:, None]


def exponential_noise(keys: tuple[jax.Array, jax.Array], token_ids: jax.Array) -> jax.Array:
    """Standard exponential variates, one a row and token.

    The uniform behind one has 32 bits, and its small end, where the winners of a race are, keeps full float precision: rare tokens
    get their share.

    Args:
        keys: of the rows, uint32 [R].
        token_ids: int32 [V].

    Returns:
        float32 [R, V], in (0, inf].
    """
    return exponential(uniform_noise(keys, token_ids))


def exponential(uniform: jax.Array) -> jax.Array:
    """Standard exponential variates of uniform ones in (0, 1), float32 of any shape; none is less than its uniform."""
    return -jnp.log1p(-uniform)
