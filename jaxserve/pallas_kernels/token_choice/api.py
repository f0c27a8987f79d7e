"""One token a row of logits, by two kernels in Pallas-Triton.

A program is a row, and a row runs only what it asks for: nothing of it needs the host, where XLA's conditionals and loops would bring
their predicates to the host and end the CUDA graph. The first kernel (race.py) serves rows that are greedy or truncate by no more than
min_p and top_p; the second (truncation.py) the others, and returns at once where there are none. They are two because a kernel's
registers are those of its hungriest path: all in one, a multiprocessor held one row at a time.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jaxserve.pallas_kernels.token_choice import race, truncation


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
    num_rows, _ = logits.shape
    vocab_size = token_counts.shape[1]
    floats = lax.bitcast_convert_type(columns, jnp.float32)
    shared = [logits, columns, floats, jnp.stack(noise_keys, axis=1), bias]
    token_ids = jax.ShapeDtypeStruct((num_rows,), jnp.int32)
    stats = jax.ShapeDtypeStruct((num_rows, 6), jnp.float32)
    state = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (token_counts, last_tokens)]
    scratch = [jax.ShapeDtypeStruct((num_rows, truncation.SCRATCH_SIZE), dtype) for dtype in (jnp.int32, jnp.float32)]

    def call(kernel, num_warps: int, name: str, carried: list[jax.Array], outputs: list[jax.ShapeDtypeStruct]):
        """What is `carried` comes back as the first outputs, in place."""
        operands = [*shared, *carried]
        return pl.pallas_call(
            functools.partial(kernel, vocab_size=vocab_size),
            grid=(num_rows,),
            in_specs=[pl.no_block_spec] * len(operands),
            out_specs=[pl.no_block_spec] * len(outputs),
            out_shape=outputs,
            input_output_aliases={len(shared) + i: i for i in range(len(carried))},
            compiler_params=plt.CompilerParams(num_warps=num_warps, num_stages=2),
            interpret=interpret,
            name=name,
        )(*operands)

    carried = call(race.choose, race.NUM_WARPS, "choose_tokens", [token_counts, last_tokens], [*state, token_ids])
    truncate = functools.partial(truncation.choose, threaded=not interpret)
    found = call(truncate, truncation.NUM_WARPS, "choose_truncated_tokens", carried, [*state, token_ids, stats, *scratch])
    token_counts, last_tokens, token_ids, stats, *_ = found
    return TokenChoice(token_ids, stats, token_counts, last_tokens)
