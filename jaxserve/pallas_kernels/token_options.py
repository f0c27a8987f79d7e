"""What a row asks of the choice of its token, as it goes up to the device, and what it does to the logits."""

import enum

import jax
import jax.numpy as jnp

PROMPT_FLAG = 1 << 30  # in a token count: the token is in the prompt
BAN_FLAG = 1 << 29  # in a token count: forbidden while the row has fewer than min_tokens


class Column(enum.IntEnum):
    """Where a row's options stand in its packed columns; those from TEMPERATURE on but TOP_K are float32.

    PREVIOUS is the token before the one that is sampled; -1: the last one that the slot sampled.
    """

    SLOT = 0
    FLAGS = 1
    POSITION = 2
    PREVIOUS = 3
    SEED_LOW = 4
    SEED_HIGH = 5
    TEMPERATURE = 6
    TOP_K = 7
    TOP_P = 8
    MIN_P = 9
    TYPICAL_P = 10
    REPETITION = 11
    PRESENCE = 12
    FREQUENCY = 13
    GREEN_SHARE = 14
    GREEN_BIAS = 15


class Flag(enum.IntFlag):
    """What a row asks for.

    SAMPLES: its logits are sampled. BANS: banned tokens are forbidden. LOGPROBS: it wants log probabilities. BIAS: its slot's logit bias
    counts. PENALTIES: its slot's token counts count. WATERMARK: green tokens get a bias.
    """

    SAMPLES = 1
    BANS = 2
    LOGPROBS = 4
    BIAS = 8
    PENALTIES = 16
    WATERMARK = 32


ADJUSTS = Flag.BANS | Flag.BIAS | Flag.PENALTIES | Flag.WATERMARK


def adjust_logits(
    value: jax.Array,
    bias: jax.Array,
    counts: jax.Array,
    bans: jax.Array,
    penalized: jax.Array,
    repetition: jax.Array,
    presence: jax.Array,
    frequency: jax.Array,
) -> jax.Array:
    """Bias, then bans, then penalties (repetition, then presence and frequency).

    Args:
        value, bias: float32, logits and what is added to them: logit bias and watermark.
        counts: int32, times each token was output, plus PROMPT_FLAG and BAN_FLAG.
        bans, penalized: bool, whether banned tokens are forbidden, whether penalties count.
        repetition, presence, frequency: float32, the penalties.

    All of one shape, or scalars, but that one shape.
    """
    value = value + bias
    value = jnp.where(bans & (counts & BAN_FLAG != 0), -jnp.inf, value)
    seen = counts & ~BAN_FLAG
    outputs = (seen & (BAN_FLAG - 1)).astype(jnp.float32)
    repeated = jnp.where(seen != 0, repetition, jnp.float32(1))
    penalty = frequency * outputs + jnp.where(outputs > 0, presence, jnp.float32(0))
    return jnp.where(penalized, jnp.where(value > 0, value / repeated, value * repeated) - penalty, value)
