"""What the sampler is told about each row of a step: packed on the host into int32 columns, unpacked inside the jit."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.pallas_kernels.token_options import Column, Flag
from jaxserve.request import SamplingParams

NUM_SAMPLING_COLUMNS = len(Column)
MIN_TEMPERATURE = 1e-5  # below it a row is greedy: distances between logits would overflow


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingRows:
    """The rows of a step, on the device. Neutral values turn an option off; a row that does not sample has only neutral values.

    Attributes:
        slots: int32 [R].
        samples: bool [R], the row's logits are sampled.
        bans: bool [R], the slot's banned tokens are forbidden (fewer than min_tokens so far).
        wants_logprobs: bool [R].
        has_bias: bool [R], the slot's logit bias counts.
        has_watermark: bool [R], green tokens get a bias.
        has_penalties: bool [R], the slot's token counts count.
        positions: int32 [R], position of the token that is sampled.
        seed_low, seed_high: uint32 [R].
        temperature: float32 [R], 0 is greedy.
        top_k: int32 [R], 0 is off.
        top_p, min_p, typical_p: float32 [R]; 1, 0, 1 are off.
        repetition_penalty, presence_penalty, frequency_penalty: float32 [R]; 1, 0, 0 are off.
        previous: int32 [R], the token before; -1: the last one that the slot sampled.
        green_share, green_bias: float32 [R], a watermark's gamma and delta; 0 is off.
    """

    slots: jax.Array
    samples: jax.Array
    bans: jax.Array
    wants_logprobs: jax.Array
    has_bias: jax.Array
    has_penalties: jax.Array
    has_watermark: jax.Array
    positions: jax.Array
    seed_low: jax.Array
    seed_high: jax.Array
    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    typical_p: jax.Array
    repetition_penalty: jax.Array
    presence_penalty: jax.Array
    frequency_penalty: jax.Array
    previous: jax.Array
    green_share: jax.Array
    green_bias: jax.Array

    @property
    def draws(self) -> jax.Array:
        """bool [R], neither greedy nor idle."""
        return self.temperature > jnp.float32(0)

    @property
    def needs_whole(self) -> jax.Array:
        """bool [R], one shard of the vocabulary must see all of the row: log probabilities are wanted, or it is truncated by more than
        min_p, whose bound follows from the largest logit alone.
        """
        truncates = (self.top_k > jnp.int32(0)) | (self.top_p < jnp.float32(1)) | (self.typical_p < jnp.float32(1))
        return self.wants_logprobs | (self.draws & truncates)


def neutral_columns() -> np.ndarray:
    """int32 [NUM_SAMPLING_COLUMNS], of a row that asks for nothing."""
    neutral = np.zeros(NUM_SAMPLING_COLUMNS, np.int32)
    neutral[[Column.TOP_P, Column.TYPICAL_P, Column.REPETITION]] = np.ones(3, np.float32).view(np.int32)
    return neutral


def unpack_rows(columns: jax.Array) -> SamplingRows:
    """Read the columns that `RowPacker.pack` wrote.

    Args:
        columns: int32 [R, NUM_SAMPLING_COLUMNS].
    """

    def flag(bit: Flag) -> jax.Array:
        return (columns[:, Column.FLAGS] & jnp.int32(bit)) != jnp.int32(0)

    def floats(column: Column) -> jax.Array:
        return jax.lax.bitcast_convert_type(columns[:, column], jnp.float32)

    def words(column: Column) -> jax.Array:
        return jax.lax.bitcast_convert_type(columns[:, column], jnp.uint32)

    return SamplingRows(
        slots=columns[:, Column.SLOT],
        samples=flag(Flag.SAMPLES),
        bans=flag(Flag.BANS),
        wants_logprobs=flag(Flag.LOGPROBS),
        has_bias=flag(Flag.BIAS),
        has_penalties=flag(Flag.PENALTIES),
        has_watermark=flag(Flag.WATERMARK),
        positions=columns[:, Column.POSITION],
        seed_low=words(Column.SEED_LOW),
        seed_high=words(Column.SEED_HIGH),
        temperature=floats(Column.TEMPERATURE),
        top_k=columns[:, Column.TOP_K],
        top_p=floats(Column.TOP_P),
        min_p=floats(Column.MIN_P),
        typical_p=floats(Column.TYPICAL_P),
        repetition_penalty=floats(Column.REPETITION),
        presence_penalty=floats(Column.PRESENCE),
        frequency_penalty=floats(Column.FREQUENCY),
        previous=columns[:, Column.PREVIOUS],
        green_share=floats(Column.GREEN_SHARE),
        green_bias=floats(Column.GREEN_BIAS),
    )


class RowPacker:
    """Host side of `SamplingRows`: what never changes is written once, when a sample enters its slot; a step copies it by slot.

    Args:
        num_slots: slots are below it.
    """

    def __init__(self, num_slots: int):
        self._columns = np.zeros((num_slots, NUM_SAMPLING_COLUMNS), np.int32)
        self._min_tokens = np.zeros(num_slots, np.int32)
        self._neutral = neutral_columns()

    def enter(self, slot: int, params: SamplingParams, seed: int) -> None:
        """A sample takes a slot.

        Args:
            slot: the slot.
            params: of its request, validated.
            seed: the sample's, of 64 bits.
        """
        row = self._neutral.copy()
        floats = row.view(np.float32)
        row[Column.SLOT] = slot
        flags = Flag.SAMPLES
        if params.logprobs is not None:
            flags |= Flag.LOGPROBS
        if params.logit_bias:
            flags |= Flag.BIAS
        if params.penalized:
            flags |= Flag.PENALTIES
            floats[[Column.REPETITION, Column.PRESENCE, Column.FREQUENCY]] = (
                params.repetition_penalty,
                params.presence_penalty,
                params.frequency_penalty,
            )
        if params.watermark_delta:
            flags |= Flag.WATERMARK
            floats[[Column.GREEN_SHARE, Column.GREEN_BIAS]] = params.watermark_gamma, params.watermark_delta
        row[Column.FLAGS] = flags
        if params.temperature >= MIN_TEMPERATURE:
            row[[Column.SEED_LOW, Column.SEED_HIGH]] = np.array([seed & 0xFFFFFFFF, seed >> 32], np.uint32).view(np.int32)
            floats[[Column.TEMPERATURE, Column.TOP_P, Column.MIN_P, Column.TYPICAL_P]] = (
                params.temperature,
                params.top_p,
                params.min_p,
                params.typical_p,
            )
            row[Column.TOP_K] = params.top_k
        self._columns[slot] = row
        self._min_tokens[slot] = params.min_tokens

    def pack(
        self,
        slots: np.ndarray,
        positions: np.ndarray,
        num_output_tokens: np.ndarray,
        samples: np.ndarray,
        num_rows: int,
        previous: np.ndarray | int = -1,
    ) -> np.ndarray:
        """The columns of a step.

        Args:
            slots: int [n], slot of each row; n <= num_rows.
            positions: int [n], position of the token that each row samples: its start plus its number of tokens.
            num_output_tokens: int [n], output tokens before that one.
            samples: bool [n], whether the row's logits are sampled.
            num_rows: rows of the bucket; those after n are padding.
            previous: int [n], the token before the sampled one; -1 where it is still on the device.

        Returns:
            int32 [num_rows, NUM_SAMPLING_COLUMNS].
        """
        count = len(slots)
        columns = np.empty((num_rows, NUM_SAMPLING_COLUMNS), np.int32)
        columns[count:] = self._neutral
        taken = columns[:count]
        np.take(self._columns, slots, axis=0, out=taken)
        taken[:, Column.POSITION], taken[:, Column.PREVIOUS] = positions, previous
        taken[:, Column.FLAGS] |= np.where(num_output_tokens < self._min_tokens[slots], Flag.BANS, 0).astype(np.int32)
        idle = ~samples
        if idle.any():
            taken[idle] = self._neutral
            taken[idle, Column.SLOT] = slots[idle]
        return columns
