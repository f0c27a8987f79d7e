"""One token a row of logits, by two kernels in Pallas-Triton.

A program is a row, and a row runs only what it asks for: nothing of it needs the host, where XLA's conditionals and loops would bring
their predicates to the host and end the CUDA graph. The first kernel (race.py) serves rows that are greedy or truncate by no more than
min_p and top_p; the second (truncation.py) the others, and returns at once where there are none. They are two because a kernel's
registers are those of its hungriest path: all in one, a multiprocessor held one row at a time.

Of a vocabulary that is cut over shards two more (token_range.py) find what a shard can say of its own range.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jaxserve.pallas_kernels.token_choice import race, token_range, truncation


class TokenChoice(NamedTuple):
    """What `choose_tokens` returns.

    Attributes:
        token_ids: int32 [R].
        stats: float32 [R, 6], the attributes of runner.distribution.Distribution in their order. Meant only for rows with LOGPROBS.
        token_counts, last_tokens: the state with the tokens of the rows that sample.
    """

    token_ids: jax.Array
    stats: jax.Array
    token_counts: jax.Array
    last_tokens: jax.Array


def choose_tokens(
    logits: jax.Array,
    columns: jax.Array,
    noise_keys: tuple[jax.Array, jax.Array],
    token_counts: jax.Array,
    bias: jax.Array,
    last_tokens: jax.Array,
    *,
    interpret: bool = False,
) -> TokenChoice:
    """Logit bias, bans, penalties; temperature, min_p, top_k, top_p, typical_p; Gumbel-max, or argmax for greedy rows.

    Ties: the lowest token id wins; a truncation keeps or drops equal logits together.

    Args:
        logits: float32 [R, V]; -inf at tokens that a mask forbids.
        columns: int32 [R, len(Column)], see Column.
        noise_keys: see noise.py.
        token_counts: int32 [S, V] by slot: times each token was output, plus PROMPT_FLAG and BAN_FLAG.
        bias: float32 [S, V] by slot.
        last_tokens: int32 [S, 1+K] by slot.
        interpret: run on the CPU, for tests.
    """
    shared = _shared(logits, columns, noise_keys, bias)
    return _choose(shared, [token_counts, last_tokens], token_counts.shape[1], interpret)


def choose_adjusted_tokens(
    logits: jax.Array, columns: jax.Array, noise_keys: tuple[jax.Array, jax.Array], vocab_size: int, *, interpret: bool = False
) -> TokenChoice:
    """The same of rows that a shard of the vocabulary was dealt, whose logits are adjusted; there is no state.

    Args:
        logits: float32 [R, V] or wider.
        columns: of rows with none of token_options.ADJUSTS and without SAMPLES, in slot 0. Those that no shard must see whole get nothing.
        vocab_size: V.
    """
    nothing = jnp.zeros((1, 1), jnp.int32)
    return _choose(_shared(logits, columns, noise_keys, nothing.astype(jnp.float32)), [nothing, nothing], vocab_size, interpret, True)


class TokenRange(NamedTuple):
    """A range of the vocabulary, and what the shard that has it knows of each row.

    Attributes:
        bounds: int32 [2], the first token id, and how many there are; logits, counts and bias may be wider.
        logits, columns, noise_keys, token_counts, bias, last_tokens: as `choose_tokens` takes them, of these tokens.
    """

    bounds: jax.Array
    logits: jax.Array
    columns: jax.Array
    noise_keys: tuple[jax.Array, jax.Array]
    token_counts: jax.Array
    bias: jax.Array
    last_tokens: jax.Array

    def largest(self, *, interpret: bool = False) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Largest adjusted logit, float32 [R], and its place in the range, int32 [R]; adjusted logits, as `logits`: only of rows that one
        shard must see whole, the others' are anything.
        """
        each = self.logits.shape[:1]
        outputs = [_words(each, jnp.float32), _words(each, jnp.int32), _words(self.logits.shape, jnp.float32)]
        best, place, adjusted = _call(token_range.largest, self._operands, outputs, token_range.NUM_WARPS, "largest_logits", interpret)
        return best, place, adjusted

    def race(self, best: jax.Array, *, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
        """Largest probability / noise, float32 [R], and its place in the range, int32 [R]; meant only for rows that sample and that no
        shard must see whole. -1 and 0 where no token takes part.

        Args:
            best: float32 [R], the largest adjusted logit of all shards.
        """
        outputs = [_words(best.shape, jnp.float32), _words(best.shape, jnp.int32)]
        score, place = _call(token_range.race, [*self._operands, best], outputs, token_range.NUM_WARPS, "race_of_shard", interpret)
        return score, place

    @property
    def _operands(self) -> list[jax.Array]:
        shared = _shared(self.logits, self.columns, self.noise_keys, self.bias)
        return [*shared, self.token_counts, self.last_tokens, self.bounds]


def _shared(logits: jax.Array, columns: jax.Array, noise_keys: tuple[jax.Array, jax.Array], bias: jax.Array) -> list[jax.Array]:
    """The operands that all kernels take first."""
    return [logits, columns, lax.bitcast_convert_type(columns, jnp.float32), jnp.stack(noise_keys, axis=1), bias]


def _choose(shared: list[jax.Array], state: list[jax.Array], vocab_size: int, interpret: bool, only_truncated: bool = False) -> TokenChoice:
    num_rows = shared[0].shape[0]
    token_ids, stats = _words((num_rows,), jnp.int32), _words((num_rows, 6), jnp.float32)
    new_state = [_words(x.shape, x.dtype) for x in state]
    scratch = [_words((num_rows, truncation.SCRATCH_SIZE), dtype) for dtype in (jnp.int32, jnp.float32)]
    first = functools.partial(race.choose, vocab_size=vocab_size, only_truncated=only_truncated)
    second = functools.partial(truncation.choose, vocab_size=vocab_size, threaded=not interpret)
    outputs = [*new_state, token_ids]
    carried = _call(first, [*shared, *state], outputs, race.NUM_WARPS, "choose_tokens", interpret, len(state))
    outputs += [stats, *scratch]
    found = _call(second, [*shared, *carried], outputs, truncation.NUM_WARPS, "choose_truncated_tokens", interpret, len(carried))
    token_counts, last_tokens, token_ids, stats, *_ = found
    return TokenChoice(token_ids, stats, token_counts, last_tokens)


def _words(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _call(
    kernel: Callable[..., None],
    operands: list[jax.Array],
    outputs: list[jax.ShapeDtypeStruct],
    num_warps: int,
    name: str,
    interpret: bool,
    num_carried: int = 0,
) -> list[jax.Array]:
    """Run a kernel, a program a row. The last `num_carried` operands come back as the first outputs, in place."""
    first = len(operands) - num_carried
    return pl.pallas_call(
        kernel,
        grid=operands[0].shape[:1],
        in_specs=[pl.no_block_spec] * len(operands),
        out_specs=[pl.no_block_spec] * len(outputs),
        out_shape=outputs,
        input_output_aliases={first + i: i for i in range(num_carried)},
        compiler_params=plt.CompilerParams(num_warps=num_warps, num_stages=2),
        interpret=interpret,
        name=name,
    )(*operands)
