"""The programs of a runner: functions of the device state, one a shape, sharded over the mesh.

A step is two: `forward` a bucket, and `sample` a row count. So the sampler is not compiled for each bucket, and the masks of constrained
rows are filled while the forward runs: `mask` applies them before the sampler. `logprobs` comes after it, where a row wants them. The
second launch mostly costs a step nothing: it waits in the queue. The steps of few streams can be shorter than the host's work, those of
a small model even with many, so these are also one program, `step`. The other programs change the state between steps: copied pages,
page-table entries, the sampler's slots.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxserve.models import Architecture
from jaxserve.pallas_kernels import Shards
from jaxserve.runner import prompt_scores, sampler, sampling_state, sharded_sampler
from jaxserve.runner.batch import BatchLayout, add_page_entries, unpack_batch
from jaxserve.runner.blueprint import Blueprint
from jaxserve.runner.buckets import Bucket, Buckets
from jaxserve.runner.exchange import PEERS_SPEC
from jaxserve.runner.sampler import SAMPLED_COLUMNS
from jaxserve.runner.sampling_rows import NUM_SAMPLING_COLUMNS, neutral_columns
from jaxserve.runner.sampling_state import SLOT_LOAD_SIZE, SamplingState
from jaxserve.runner.state import SAMPLING_SPEC, STATE_SPEC, VOCABULARY_SPEC, DeviceState, abstract_state
from jaxserve.runner.vocabulary import VocabularyShards, shard_width

PAGE_COPIES = 16  # a call
PAGE_ENTRIES = 1024  # a call
# XLA autotunes nothing. What it times, on a GPU that other programs' compilation keeps busy, it decides for each shape apart: so the
# reductions of 64 rows and of 256 would add up in other orders, and --deterministic would not hold.
UNTUNED = {"xla_gpu_autotune_level": 0}
# Of products its autotuner compiles dozens of Triton kernels for each, which is most of a cold start, and picks worse ones of cuBLAS's
# algorithms than cuBLAS itself does.
PRODUCTS = {"xla_gpu_enable_triton_gemm": False, **UNTUNED}
# The same for products by Triton alone: each tile of a result is computed by the same code in the same order.
TRITON_PRODUCTS = {"xla_gpu_enable_triton_gemm": True, "xla_gpu_triton_gemm_any": True, "xla_gpu_cublas_fallback": False}

_EVERYWHERE = PartitionSpec()
_ARRAY = 0  # in a tree of results


class ProgramKey(NamedTuple):
    """Which program of a runner.

    Attributes:
        kind: a method of Programs.
        shape: what it takes: a bucket, or rows of logits.
    """

    kind: str
    shape: Bucket | int | None = None

    @property
    def name(self) -> str:
        """For files, logs and other processes: "forward-512x256", "sample-8"."""
        match self.shape:
            case Bucket(num_tokens, num_rows, decode_only):
                return f"{self.kind}-{num_tokens}x{num_rows}{'-decode' if decode_only else ''}"
            case int(num_rows):
                return f"{self.kind}-{num_rows}"
        return self.kind


class Program(NamedTuple):
    """Something to lower and compile.

    Attributes:
        function: jitted.
        arguments: their shapes, and their shardings over a mesh without devices.
        results: a tree of their form; what its leaves are means nothing.
        donated: the argument whose memory the results take; () for none.
        options: XLA's, by name.
    """

    function: Any
    arguments: tuple[Any, ...]
    results: Any
    donated: int | tuple[()]
    options: dict[str, Any]


class Programs:
    """Makes the programs of a blueprint, by their keys. Needs none of its devices; traces nothing by itself."""

    def __init__(self, blueprint: Blueprint):
        self.blueprint = blueprint
        self.plan = blueprint.plan
        self.mesh = blueprint.mesh
        self.architecture = Architecture.of(blueprint.model, blueprint.attention)
        self.leaves = self._leaves()
        self.buckets = self._buckets()
        hidden = self._array((self.buckets.max_scored_tokens, blueprint.model.hidden_size), jnp.dtype(blueprint.dtype))
        self.state = abstract_state(self.plan, blueprint.num_slots, blueprint.model.vocab_size, hidden, self.mesh)

    def __iter__(self) -> Iterator[ProgramKey]:
        """The key of every program that a legal request can hit.

        The largest comes first: the plan waits for it. Then those that take long to compile and are lowered quickly.
        """
        yield self.largest()
        yield from (ProgramKey("step", bucket) for bucket in self.buckets.whole)
        kinds = "sample", "logprobs", *(["mask"] if self.blueprint.masked else [])
        yield from itertools.starmap(ProgramKey, itertools.product(kinds, reversed(self.buckets.logits)))
        yield from (key for bucket in sorted(self.buckets, reverse=True) if (key := ProgramKey("forward", bucket)) != self.largest())
        yield from map(ProgramKey, ("score", "copy_pages", "load_slot", "add_page_entries"))

    def largest(self) -> ProgramKey:
        """The one whose temporaries are largest."""
        return ProgramKey("forward", max(self.buckets, key=lambda bucket: (bucket.num_tokens, bucket.num_rows)))

    def __getitem__(self, key: ProgramKey) -> Program:
        """A program by its key."""
        match key.shape:
            case Bucket():
                layout = BatchLayout.of(key.shape, len(self.plan.num_pages), self.plan.page_size)
                return getattr(self, key.kind)(layout, self.buckets.logit_rows(key.shape))
            case int(num_rows):
                return getattr(self, key.kind)(num_rows)
        return getattr(self, key.kind)()

    def forward(self, layout: BatchLayout, logit_rows: int) -> Program:
        """(leaves, state, packed[, peers]) -> (state, logits, the sampler's columns of packed).

        Args:
            layout: of the bucket.
            logit_rows: rows of the logits and columns; those beyond the bucket's are padding.
        """
        return self._model_program(self._forward(layout, logit_rows), layout, (VOCABULARY_SPEC, _EVERYWHERE))

    def step(self, layout: BatchLayout, logit_rows: int) -> Program:
        """(leaves, state, packed[, peers]) -> (state, what unpack_sampled() reads): `forward` and `sample` in one."""
        forward = self._forward(layout, logit_rows)

        def step(
            leaves: tuple[jax.Array, ...], state: DeviceState, packed: jax.Array, peers: jax.Array | None = None
        ) -> tuple[DeviceState, jax.Array]:
            state, logits, columns = forward(leaves, state, packed, peers)
            sampled, sampling = self._sample(logits, state.sampling, columns, peers)
            return replace(state, sampling=sampling), sampled

        return self._model_program(step, layout, (_EVERYWHERE,))

    def _forward(self, layout: BatchLayout, logit_rows: int) -> Callable[..., tuple[DeviceState, jax.Array, jax.Array]]:
        padding = logit_rows - layout.bucket.num_rows
        whole = layout.bucket.num_tokens <= self.buckets.max_scored_tokens

        def forward(
            leaves: tuple[jax.Array, ...], state: DeviceState, packed: jax.Array, peers: jax.Array | None = None
        ) -> tuple[DeviceState, jax.Array, jax.Array]:
            tables_and_tokens = state.page_tables, state.sampling.last_tokens
            batch, tables = unpack_batch(packed, layout, *tables_and_tokens, self.plan, self.blueprint.deterministic)
            last, columns = batch.last, layout.split(packed).sampling
            if padding:  # of nothing, it would crash XLA's CPU compiler on a mesh
                last = jnp.pad(last, (0, padding))
                columns = jnp.concatenate([columns, np.tile(neutral_columns(), (padding, 1))])
            shards = Shards(peers, deterministic=self.blueprint.deterministic)
            tokens = batch.token_ids, batch.positions
            logits, kv, x = self.architecture.apply(leaves, *tokens, state.kv, batch.metadata, last, shards, whole=whole)
            hidden = state.hidden if x is None else jax.lax.dynamic_update_slice(state.hidden, x, (0, 0))
            return DeviceState(kv, tables, state.sampling, hidden), logits, columns

        return forward

    def _model_program(self, function: Callable[..., Any], layout: BatchLayout, outputs: tuple[PartitionSpec, ...]) -> Program:
        """Of (leaves, state, packed[, peers]) -> (state, *outputs)."""
        specs = self.architecture.specs, STATE_SPEC, _EVERYWHERE, *(PEERS_SPEC for _ in self._peers())
        arguments = self.leaves, self.state, self._ints(layout.size), *self._peers()
        results = self.state, *(_ARRAY for _ in outputs)
        return self._program(function, arguments, specs, (STATE_SPEC, *outputs), results, donated=1, options=PRODUCTS)

    def mask(self, num_rows: int) -> Program:
        """(logits, masks) -> logits."""

        def apply_masks(logits: jax.Array, masks: jax.Array) -> jax.Array:
            if (vocabulary := self._vocabulary()) is None:
                return sampler.apply_masks(logits, masks)
            return sharded_sampler.apply_masks(logits, masks, vocabulary)

        masks = self._array((num_rows, mask_words(self.blueprint.model.vocab_size)), jnp.uint32)
        specs = VOCABULARY_SPEC, _EVERYWHERE
        return self._program(apply_masks, (self._logits(num_rows), masks), specs, VOCABULARY_SPEC, _ARRAY, donated=())

    def sample(self, num_rows: int) -> Program:
        """(logits, sampling state, columns[, peers]) -> (what unpack_sampled() reads, sampling state)."""

        def sample(
            logits: jax.Array, state: SamplingState, columns: jax.Array, peers: jax.Array | None = None
        ) -> tuple[jax.Array, SamplingState]:
            return self._sample(logits, state, columns, peers)

        arguments = self._logits(num_rows), self.state.sampling, self._ints(num_rows, NUM_SAMPLING_COLUMNS), *self._peers()
        specs = VOCABULARY_SPEC, SAMPLING_SPEC, _EVERYWHERE, *(PEERS_SPEC for _ in self._peers())
        results = _ARRAY, self.state.sampling
        return self._program(sample, arguments, specs, (_EVERYWHERE, SAMPLING_SPEC), results, donated=1)

    def logprobs(self, num_rows: int) -> Program:
        """(logits, masked logits, sampling state, columns, sampled[, peers]) -> what unpack_sampled() reads."""

        def find_logprobs(
            raw: jax.Array,
            logits: jax.Array,
            state: SamplingState,
            columns: jax.Array,
            sampled: jax.Array,
            peers: jax.Array | None = None,
        ) -> jax.Array:
            if (vocabulary := self._vocabulary(peers)) is None:
                return sampler.find_logprobs(raw, logits, state, columns, sampled)
            return sharded_sampler.find_logprobs(raw, logits, state, columns, sampled, vocabulary)

        ints = self._ints(num_rows, NUM_SAMPLING_COLUMNS), self._ints(num_rows, SAMPLED_COLUMNS)
        arguments = self._logits(num_rows), self._logits(num_rows), self.state.sampling, *ints, *self._peers()
        specs = VOCABULARY_SPEC, VOCABULARY_SPEC, SAMPLING_SPEC, _EVERYWHERE, _EVERYWHERE, *(PEERS_SPEC for _ in self._peers())
        return self._program(find_logprobs, arguments, specs, _EVERYWHERE, _ARRAY, donated=())

    def score(self) -> Program:
        """(leaves, hidden, int32 [2, num_scored_a_call]: tokens of the last step, and which follows each) -> what unpack_scored() reads."""

        def score(leaves: tuple[jax.Array, ...], hidden: jax.Array, upload: jax.Array) -> jax.Array:
            x = hidden.at[upload[0]].get(mode="promise_in_bounds")
            logits = self.architecture.logits(leaves, x, self.blueprint.deterministic)
            if (vocabulary := self._vocabulary()) is None:
                return prompt_scores.score_tokens(logits, upload[1])
            return sharded_sampler.score_tokens(logits, upload[1], vocabulary)

        num_tokens = num_scored_a_call(self.blueprint.device_platform)
        specs = self.architecture.specs, _EVERYWHERE, _EVERYWHERE
        arguments = self.leaves, self.state.hidden, self._ints(2, num_tokens)
        return self._program(score, arguments, specs, _EVERYWHERE, _ARRAY, donated=(), options=PRODUCTS)

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
            return replace(state, sampling=sampling_state.load_slot(state.sampling, upload, self._vocabulary()))

        return self._state_program(load, self._ints(SLOT_LOAD_SIZE))

    def _sample(
        self, logits: jax.Array, state: SamplingState, columns: jax.Array, peers: jax.Array | None
    ) -> tuple[jax.Array, SamplingState]:
        if (vocabulary := self._vocabulary(peers)) is None:
            return sampler.sample(logits, state, columns)
        return sharded_sampler.sample(logits, state, columns, vocabulary)

    def _vocabulary(self, peers: jax.Array | None = None) -> VocabularyShards | None:
        """How it is cut, while tracing; None: one shard has all of it."""
        return VocabularyShards(self.blueprint.model.vocab_size, Shards(peers)) if self.blueprint.tensor_size > 1 else None

    def _state_program(self, function: Callable[..., DeviceState], upload: jax.ShapeDtypeStruct) -> Program:
        return self._program(function, (self.state, upload), (STATE_SPEC, _EVERYWHERE), STATE_SPEC, self.state, donated=0)

    def _program(
        self,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        in_specs: Any,
        out_specs: Any,
        results: Any,
        donated: int | tuple[()],
        options: dict[str, Any] | None = None,
    ) -> Program:
        # check_vma would ask every loop of every kernel to declare what varies over the mesh.
        sharded = jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
        return Program(jax.jit(sharded, donate_argnums=donated), arguments, results, donated, options or UNTUNED)

    def _buckets(self) -> Buckets:
        """The shapes of steps. Deterministic ones have one, but where our own kernels compute all that could depend on it."""
        of = self.blueprint
        if not of.deterministic:
            weight_bytes = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in self.leaves)
            return Buckets.for_platform(of.device_platform, of.num_slots, of.max_batch_tokens, weight_bytes)
        with jax.sharding.use_abstract_mesh(self.mesh):
            several = of.attention != "xla" and self.architecture.has_fixed_order(jnp.dtype(of.dtype), of.tensor_size)
        sizes = Buckets.deterministic_sizes(of.common_tokens, of.max_batch_tokens) if several else (of.common_tokens,)
        return Buckets.deterministic(of.num_slots, sizes)

    def _leaves(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        dtype, shards = jnp.dtype(self.blueprint.dtype), self.blueprint.tensor_size
        with jax.sharding.use_abstract_mesh(self.mesh):  # how a quantized weight is packed depends on the device
            return tuple(
                jax.ShapeDtypeStruct(
                    parameter.shape(shards), parameter.dtype(dtype, shards), sharding=NamedSharding(self.mesh, parameter.spec)
                )
                for parameter in self.architecture.parameters
            )

    def _peers(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The table of peers, where there is one."""
        shards, sharding = self.blueprint.tensor_size, NamedSharding(self.mesh, PEERS_SPEC)
        return (jax.ShapeDtypeStruct((shards, shards + 1, 2), jnp.uint32, sharding=sharding),) if self.blueprint.peer_memory else ()

    def _logits(self, num_rows: int) -> jax.ShapeDtypeStruct:
        shards = self.blueprint.tensor_size
        shape = num_rows, shards * shard_width(self.blueprint.model.vocab_size, shards)
        return self._array(shape, jnp.float32, VOCABULARY_SPEC)

    def _ints(self, *shape: int) -> jax.ShapeDtypeStruct:
        return self._array(shape, jnp.int32)

    def _array(self, shape: tuple[int, ...], dtype: Any, spec: PartitionSpec = _EVERYWHERE) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self.mesh, spec))


def num_scored_a_call(platform: str) -> int:
    """Tokens of prompts that the scoring program takes. On a GPU the head's weights are read once for so many."""
    return 64 if platform == "cpu" else 256


def mask_words(vocab_size: int) -> int:
    """uint32 words of a token mask."""
    return -(-vocab_size // 32)
