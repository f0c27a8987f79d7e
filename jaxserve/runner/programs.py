"""The programs of a runner: functions of the device state, traced once a shape, sharded over the mesh.

A step is two: `forward` a bucket, and `sample` a row count. So the sampler is not compiled for each bucket, its form (token masks, log
probabilities) is the host's choice, and the masks of constrained rows are filled while the forward runs. The second launch costs a step
nothing: it waits in the queue. The other programs change the state between steps: copied pages, page-table entries, the sampler's slots.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.models import Model
from jaxserve.runner.batch import BatchLayout, add_page_entries, unpack_batch
from jaxserve.runner.kv_cache import KVCachePlan
from jaxserve.runner.prompt_scores import score_tokens
from jaxserve.runner.sampler import sample
from jaxserve.runner.sampling_rows import NUM_SAMPLING_COLUMNS, neutral_columns
from jaxserve.runner.sampling_state import SLOT_LOAD_SIZE, SamplingState, load_slot
from jaxserve.runner.state import STATE_SPEC, DeviceState

PAGE_COPIES = 16  # a call
PAGE_ENTRIES = 1024  # a call
_MOST_TRITON_TOKENS = 32

_EVERYWHERE = PartitionSpec()


class Program(NamedTuple):
    """Something to compile: a jitted function, and the shapes and shardings of its arguments."""

    function: Any
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Programs:
    """Makes the programs of a model on a mesh.

    Attributes:
        model: its leaves are arguments, never constants.
        mesh: with axes "data" and "tensor".
        plan: sizes of the KV cache.
        state: shapes of the device state.
    """

    model: Model
    mesh: Mesh
    plan: KVCachePlan
    state: DeviceState

    def forward(self, layout: BatchLayout, logit_rows: int) -> Program:
        """(leaves, state, packed) -> (state, logits, the sampler's columns of packed).

        Args:
            layout: of the bucket.
            logit_rows: rows of the logits and columns; those beyond the bucket's are padding.
        """
        padding = logit_rows - layout.bucket.num_rows

        def forward(leaves: tuple[jax.Array, ...], state: DeviceState, packed: jax.Array) -> tuple[DeviceState, jax.Array, jax.Array]:
            batch, tables = unpack_batch(packed, layout, state.page_tables, state.sampling.last_tokens, self.plan)
            last, columns = batch.last, layout.split(packed).sampling
            if padding:  # of nothing, it would crash XLA's CPU compiler on a mesh
                last = jnp.pad(last, (0, padding))
                columns = jnp.concatenate([columns, np.tile(neutral_columns(), (padding, 1))])
            logits, kv, x = self.model.apply(leaves, batch.token_ids, batch.positions, state.kv, batch.metadata, last)
            hidden = jax.lax.dynamic_update_slice(state.hidden, x, (0, 0))
            return DeviceState(kv, tables, state.sampling, hidden), logits, columns

        specs = self.model.specs, STATE_SPEC, _EVERYWHERE
        arguments = self.model.leaves, self.state, self._ints(layout.size)
        options = _product_options(layout.bucket.num_tokens)
        return Program(self._jit(forward, specs, (STATE_SPEC, _EVERYWHERE, _EVERYWHERE), donated=1, options=options), arguments)

    def sample(self, num_rows: int, *, masked: bool, logprobs: bool) -> Program:
        """(logits, sampling state, columns[, masks]) -> (sampling state, what unpack_sampled() reads)."""

        def sample_all(
            logits: jax.Array, state: SamplingState, columns: jax.Array, masks: jax.Array | None = None
        ) -> tuple[SamplingState, jax.Array]:
            sampled, state = sample(logits, state, columns, masks, logprobs=logprobs)
            return state, sampled

        logits = self._array((num_rows, self.model.config.vocab_size), jnp.float32)
        masks = [self._array((num_rows, mask_words(self.model.config.vocab_size)), jnp.uint32)] if masked else []
        arguments = logits, self.state.sampling, self._ints(num_rows, NUM_SAMPLING_COLUMNS), *masks
        return Program(self._jit(sample_all, (_EVERYWHERE,) * len(arguments), (_EVERYWHERE, _EVERYWHERE), donated=1), arguments)

    def score(self, num_tokens: int) -> Program:
        """(leaves, hidden, int32 [2, num_tokens]: tokens of the last step, and which token follows each) -> what unpack_scored() reads."""

        def score(leaves: tuple[jax.Array, ...], hidden: jax.Array, upload: jax.Array) -> jax.Array:
            logits = self.model.architecture.logits(leaves, hidden.at[upload[0]].get(mode="promise_in_bounds"))
            return score_tokens(logits, upload[1])

        specs = self.model.specs, _EVERYWHERE, _EVERYWHERE
        arguments = self.model.leaves, self.state.hidden, self._ints(2, num_tokens)
        return Program(self._jit(score, specs, _EVERYWHERE, donated=(), options=_product_options(num_tokens)), arguments)

    def copy_pages(self) -> Program:
        """(state, int32 [groups, 2, PAGE_COPIES]) -> state with pages [g, 0] copied to [g, 1]; a target out of range is dropped."""

        def copy_pages(state: DeviceState, pages: jax.Array) -> DeviceState:
            def copy(x: jax.Array, group: int) -> jax.Array:
                source = x.at[pages[group, 0]].get(mode="clip")
                return x.at[pages[group, 1]].set(source, mode="drop", unique_indices=True)

            kv = tuple((copy(k, g), copy(v, g)) for (k, v), g in zip(state.kv, self.plan.group_of_layer, strict=True))
            return replace(state, kv=kv)

        return self._state_program(copy_pages, self._ints(len(self.plan.num_pages), 2, PAGE_COPIES))

    def add_page_entries(self) -> Program:
        """(state, int32 [PAGE_ENTRIES, 2 + groups]) -> state with these entries of page tables; a slot out of range is dropped."""

        def add_entries(state: DeviceState, entries: jax.Array) -> DeviceState:
            return replace(state, page_tables=add_page_entries(state.page_tables, entries))

        return self._state_program(add_entries, self._ints(PAGE_ENTRIES, 2 + len(self.plan.num_pages)))

    def load_slot(self) -> Program:
        """(state, int32 [SLOT_LOAD_SIZE]) -> state with a slot of the sampler loaded."""

        def load(state: DeviceState, upload: jax.Array) -> DeviceState:
            return replace(state, sampling=load_slot(state.sampling, upload))

        return self._state_program(load, self._ints(SLOT_LOAD_SIZE))

    def _state_program(self, function: Callable[..., DeviceState], upload: jax.ShapeDtypeStruct) -> Program:
        return Program(self._jit(function, (STATE_SPEC, _EVERYWHERE), STATE_SPEC, donated=0), (self.state, upload))

    def _jit(
        self, function: Callable[..., Any], in_specs: Any, out_specs: Any, donated: int | tuple[()], options: dict[str, Any] | None = None
    ) -> Any:
        # check_vma would ask every loop of every kernel to declare what varies over the mesh.
        sharded = jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
        return jax.jit(sharded, donate_argnums=donated, compiler_options=options)

    def _ints(self, *shape: int) -> jax.ShapeDtypeStruct:
        return self._array(shape, jnp.int32)

    def _array(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self.mesh, _EVERYWHERE))


def _product_options(num_tokens: int) -> dict[str, Any]:
    """XLA's options for products with so many tokens."""
    # With more tokens XLA's autotuner picks cuBLAS anyway, after it has compiled dozens of Triton kernels for each product.
    return {} if num_tokens <= _MOST_TRITON_TOKENS else {"xla_gpu_enable_triton_gemm": False}


def mask_words(vocab_size: int) -> int:
    """uint32 words of a token mask."""
    return -(-vocab_size // 32)
