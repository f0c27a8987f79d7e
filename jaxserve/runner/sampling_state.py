"""What the sampler keeps on the device by slot: token counts, logit bias, banned tokens and the last tokens."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.pallas_kernels.token_options import BAN_FLAG, PROMPT_FLAG
from jaxserve.request import MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS, SamplingParams
from jaxserve.runner.vocabulary import VocabularyShards

MAX_BANS = MAX_STOP_TOKEN_IDS + 32
LOAD_CHUNK = 2048

_SLOT, _RESET, _NUM_PROMPT, _NUM_TOKENS, _TOKENS = range(5)
_BIAS_IDS = _TOKENS + LOAD_CHUNK
_BIAS_VALUES = _BIAS_IDS + MAX_LOGIT_BIAS
_BAN_IDS = _BIAS_VALUES + MAX_LOGIT_BIAS
SLOT_LOAD_SIZE = _BAN_IDS + MAX_BANS


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingState:
    """Donated to each step. A slot's entries mean something only while its sample uses them: whoever enters loads them first.

    Attributes:
        token_counts: int32 [S, V]: times each token was output, plus PROMPT_FLAG if it is in the prompt, plus BAN_FLAG if it is
            forbidden before min_tokens.
        bias: float32 [S, V].
        last_tokens: int32 [S, 1+K], what the last step that sampled the slot chose.
    """

    token_counts: jax.Array
    bias: jax.Array
    last_tokens: jax.Array


def make_sampling_state(num_slots: int, vocab_size: int, num_speculative: int = 0) -> SamplingState:
    """An empty state: jit it with out_shardings to place it.

    Args:
        num_slots: S.
        vocab_size: V, without padding, but that of a vocabulary that is cut over shards.
        num_speculative: K.
    """
    return SamplingState(
        token_counts=jnp.zeros((num_slots, vocab_size), jnp.int32),
        bias=jnp.zeros((num_slots, vocab_size), jnp.float32),
        last_tokens=jnp.zeros((num_slots, 1 + num_speculative), jnp.int32),
    )


def needs_slot_load(params: SamplingParams) -> bool:
    """Whether a sample that enters a slot must load it first."""
    return params.penalized or bool(params.logit_bias) or params.min_tokens > 0


def slot_loads(
    slot: int,
    params: SamplingParams,
    prompt_token_ids: Sequence[int],
    output_token_ids: Sequence[int],
    eos_token_ids: Sequence[int],
    vocab_size: int,
) -> Iterator[np.ndarray]:
    """The uploads that load a slot, to be given to `load_slot` one after the other.

    Args:
        slot: the slot.
        params: of the sample that enters it.
        prompt_token_ids: all of them.
        output_token_ids: those so far (after a preemption).
        eos_token_ids: of the model; forbidden before min_tokens together with params.stop_token_ids.
        vocab_size: V.

    Yields:
        int32 [SLOT_LOAD_SIZE]: one for bias and bans, more only for penalties over more than LOAD_CHUNK tokens.

    Raises:
        ValueError: more than MAX_BANS tokens to ban.
    """
    bans = list(dict.fromkeys([*eos_token_ids, *params.stop_token_ids])) if params.min_tokens else []
    if len(bans) > MAX_BANS:
        raise ValueError(f"{len(bans)} end-of-sequence and stop token ids, at most {MAX_BANS}")
    first = np.full(SLOT_LOAD_SIZE, vocab_size, np.int32)
    first[[_SLOT, _RESET, _NUM_PROMPT, _NUM_TOKENS]] = slot, 1, 0, 0
    first[_BIAS_IDS : _BIAS_IDS + len(params.logit_bias)] = list(params.logit_bias)
    values = np.zeros(MAX_LOGIT_BIAS, np.float32)
    values[: len(params.logit_bias)] = list(params.logit_bias.values())
    first[_BIAS_VALUES:_BAN_IDS] = values.view(np.int32)
    first[_BAN_IDS : _BAN_IDS + len(bans)] = bans
    tokens = np.array([*prompt_token_ids, *output_token_ids], np.int32) if params.penalized else np.zeros(0, np.int32)
    for start in range(0, max(len(tokens), 1), LOAD_CHUNK):
        load = first.copy()
        chunk = tokens[start : start + LOAD_CHUNK]
        load[_RESET] = start == 0
        load[_NUM_PROMPT] = min(max(len(prompt_token_ids) - start, 0), len(chunk))
        load[_NUM_TOKENS] = len(chunk)
        load[_TOKENS : _TOKENS + len(chunk)] = chunk
        yield load


def load_slot(state: SamplingState, load: jax.Array, vocabulary: VocabularyShards | None = None) -> SamplingState:
    """Write one upload of `slot_loads` into its slot (jitted by the runner, state donated).

    Args:
        state: the state.
        load: int32 [SLOT_LOAD_SIZE].
        vocabulary: of which the state has this shard's range; None: it has all.
    """
    slot, nowhere = load[_SLOT], jnp.int32(state.token_counts.shape[1])

    def places_of(token_ids: jax.Array) -> jax.Array:
        return token_ids if vocabulary is None else vocabulary.places(token_ids)

    anew = load[_RESET] != jnp.int32(0)

    def row_of(table: jax.Array) -> jax.Array:
        return jnp.where(anew, jnp.zeros((), table.dtype), jax.lax.dynamic_index_in_dim(table, slot, keepdims=False))

    tokens = places_of(load[_TOKENS:_BIAS_IDS])
    places = jnp.arange(LOAD_CHUNK, dtype=jnp.int32)
    prompt = jnp.where(places < load[_NUM_PROMPT], tokens, nowhere)
    output = jnp.where((places >= load[_NUM_PROMPT]) & (places < load[_NUM_TOKENS]), tokens, nowhere)
    counts = row_of(state.token_counts)
    counts = counts.at[prompt].set(counts.at[prompt].get(mode="clip") | jnp.int32(PROMPT_FLAG), mode="drop")
    counts = counts.at[output].add(jnp.int32(1), mode="drop")
    bans = places_of(load[_BAN_IDS:])
    counts = counts.at[bans].set(counts.at[bans].get(mode="clip") | jnp.int32(BAN_FLAG), mode="drop")
    values = jax.lax.bitcast_convert_type(load[_BIAS_VALUES:_BAN_IDS], jnp.float32)
    bias = row_of(state.bias).at[places_of(load[_BIAS_IDS:_BIAS_VALUES])].set(values, mode="drop")
    return replace(
        state,
        token_counts=jax.lax.dynamic_update_index_in_dim(state.token_counts, counts, slot, 0),
        bias=jax.lax.dynamic_update_index_in_dim(state.bias, bias, slot, 0),
    )
