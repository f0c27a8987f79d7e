"""Executor: runs the programs of one replica on this process's devices, in the order of the calls.

A call is the key of a program and the host's arrays for it. All else that a program takes is here: weights, device state, and what the
program before it left. So whoever replays the calls of an executor on other devices of the same mesh computes the same steps.
"""

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Compiled

from jaxserve.models import Model
from jaxserve.runner.batch import BatchLayout, BatchPacker
from jaxserve.runner.buckets import Bucket
from jaxserve.runner.compile import CompileEvents
from jaxserve.runner.config import RunnerConfig
from jaxserve.runner.exchange import Exchange, reach_each_other
from jaxserve.runner.hosts import Hosts
from jaxserve.runner.kv_cache import KVCachePlan
from jaxserve.runner.preparation import Preparation
from jaxserve.runner.programs import PAGE_COPIES, PAGE_ENTRIES, TRITON_PRODUCTS, ProgramKey, mask_words, num_scored_a_call
from jaxserve.runner.sampling_rows import neutral_columns
from jaxserve.runner.sampling_state import SLOT_LOAD_SIZE
from jaxserve.runner.state import VOCABULARY_SPEC, allocate_state
from jaxserve.runner.vocabulary import shard_width

logger = logging.getLogger(__name__)

_MOST_RECORDED_TOKENS = 1024
_NOWHERE = 2**30  # beyond all pages, slots and tokens
RECOMPILE = "recompile"  # stands where the name of a program stands


class Executor:
    """Owns weights, device state and compiled programs. Not thread-safe.

    Args:
        model: loaded on the mesh.
        mesh: axes ("data", "tensor"); data is 1. Its devices may be of several processes.
        config: sizes.
        preparation: of the same model, mesh and config.
        hosts: those that the mesh spans, where they are several: each call is told to them before it is run here.

    Raises:
        DeviceError: the KV cache does not fit.
    """

    def __init__(self, model: Model, mesh: Mesh, config: RunnerConfig, preparation: Preparation, hosts: Hosts | None = None):
        # For life
        self._model, self._mesh, self._config = model, mesh, config
        self._preparation = preparation
        self._hosts = hosts
        self._platform = mesh.devices.flat[0].platform
        self._plan = preparation.plan()
        self._replicated = NamedSharding(mesh, PartitionSpec())
        self._compiled: dict[ProgramKey, Compiled] = {}
        self._keys: dict[str, ProgramKey] = {}
        self._compile_events = CompileEvents()
        self._exchange = Exchange(mesh) if config.peer_memory and reach_each_other(mesh) else None
        # From call to call, between a forward and its sampler: logits and the sampler's columns; the logits once masks were applied.
        self._logits: Sequence[Any] = ()
        self._masked: Any = None

    @property
    def plan(self) -> KVCachePlan:
        """Sizes of the KV cache."""
        return self._plan

    @property
    def logits(self) -> jax.Array:
        """Of the step between its forward and its sampler, float32 [rows of the bucket's logits, V or wider], cut over the shards."""
        return self._logits[0]

    @property
    def compile_events(self) -> int:
        """What was compiled in this process since warmup()."""
        return self._compile_events.count

    def warmup(self) -> None:
        """Wait for every program that a legal request can hit, and run each, for nobody; from then on nothing is compiled."""
        vocab_size = self._model.config.vocab_size
        hidden = jax.ShapeDtypeStruct((self._preparation.buckets.max_scored_tokens, self._model.config.hidden_size), self._model.dtype)
        self._state = allocate_state(self._plan, self._config.max_batch_size, vocab_size, hidden, self._mesh)
        logger.info("the state is allocated")
        seconds = 0.0
        programs: Iterable[tuple[ProgramKey, Compiled]] = self._preparation.programs()
        if self._hosts is not None and self._platform == "cpu":
            # Gloo waits half a minute for the others, and where the cache has this host's programs they may still compile theirs.
            programs = list(programs)
            self._hosts.gather("programs", "compiled")
        for key, program in programs:  # while others are still compiled
            self._keys[key.name], self._compiled[key] = key, program
            begin = time.monotonic()
            self._rehearse(key)
            seconds += time.monotonic() - begin
        logger.info("programs were run for %.1f s, while others were compiled", seconds)
        self._record_graphs()
        self._compile_events.start()

    def run(self, key: ProgramKey, *arrays: np.ndarray) -> jax.Array | None:
        """Start a program; returns at once.

        Args:
            key: one of those that were compiled.
                After a forward "mask" may come, and then either "sample" or "logprobs", which samples too.
            arrays: what the host sends up: of a forward its packed batch, of a mask those of all rows, of a sampler nothing, else one
                array. Not to be changed afterwards.

        Returns:
            what the host reads, of "step", "sample", "logprobs" and "score": a replicated array, or this process's copy of it.
        """
        if self._hosts is not None:
            self._hosts.tell(key.name, arrays)
        return self._run(key, arrays)

    def recompile_products(self) -> None:
        """Compile all products again, by Triton alone; what was on the devices is lost."""
        if self._hosts is not None:
            self._hosts.tell(RECOMPILE, ())
        self._recompile_products()

    def replay(self, name: str, arrays: Sequence[np.ndarray]) -> None:
        """Do what another host told.

        Args:
            name: of a program, or RECOMPILE.
            arrays: as for run().
        """
        if name == RECOMPILE:
            self._recompile_products()
        else:
            self._run(self._keys[name], arrays)

    def close(self) -> None:
        """Stop counting compile events; the arrays go with the executor."""
        self._compile_events.stop()

    def _run(self, key: ProgramKey, arrays: Sequence[np.ndarray]) -> jax.Array | None:
        program, uploads, result = self._compiled[key], [self._upload(array) for array in arrays], None
        peers = () if self._exchange is None else (self._exchange.peers,)
        if key.kind in ("forward", "step"):
            self._state, *results = program(self._model.leaves, self._state, *uploads, *peers)
            if key.kind == "forward":
                self._logits = results
            else:
                (result,) = results
        elif key.kind == "mask":
            self._masked = program(self._logits[0], *uploads)
        elif key.kind in ("sample", "logprobs"):
            (raw, columns), self._logits = self._logits, ()
            logits, self._masked = raw if self._masked is None else self._masked, None
            result, sampling = self._compiled[key._replace(kind="sample")](logits, self._state.sampling, columns, *peers)
            self._state = replace(self._state, sampling=sampling)
            if key.kind == "logprobs":
                result = program(raw, logits, sampling, columns, result, *peers)
        elif key.kind == "score":
            result = program(self._model.leaves, self._state.hidden, *uploads)
        else:
            self._state = program(self._state, *uploads)
        # Of an array on devices of several processes each can read its own part alone, here all of it.
        return result if result is None or self._hosts is None else result.addressable_data(0)

    def _upload(self, array: np.ndarray) -> Any:
        """What a program takes for a host's array."""
        if self._hosts is None:
            return array  # a compiled program puts it on the devices itself, faster than device_put
        return jax.make_array_from_process_local_data(self._replicated, array, array.shape)

    def _recompile_products(self) -> None:
        keys = [key for key in self._compiled if key.kind in ("forward", "step", "score")]
        for key, program in self._preparation.compile_again(keys, TRITON_PRODUCTS).items():
            self._compiled[key] = program
            self._rehearse(key)
        self._record_graphs()

    def _record_graphs(self) -> None:
        """Run the small programs again, now that all are loaded.

        XLA records a program's CUDA graph in its second run, and drops those of all programs when it loads another one. To record takes
        milliseconds, which only small steps must be spared. What is left of the compilation is freed in the first of these runs, too.
        """
        if self._platform == "cpu":
            return
        begin = time.monotonic()
        for key in self._compiled:
            if not isinstance(bucket := key.shape, Bucket) or bucket.num_tokens <= _MOST_RECORDED_TOKENS:
                self._rehearse(key)
                self._rehearse(key)
        logger.info("the small ones were run again for %.1f s", time.monotonic() - begin)

    def _rehearse(self, key: ProgramKey) -> None:
        """Run what the first request would otherwise be the first to run, for nobody: it changes nothing that somebody will read.

        Of a CPU's forwards only the smallest runs.
        """
        buckets = [each.shape for each in self._preparation.keys if isinstance(each.shape, Bucket)]
        if self._platform == "cpu" and key.shape in buckets and key.shape != min(buckets):
            return
        if isinstance(num_rows := key.shape, int):
            self._logits = [self._idle_logits(num_rows), self._upload(np.tile(neutral_columns(), (num_rows, 1)))]
        self._run(key, self._idle_arrays(key))
        self._logits, self._masked = (), None
        jax.block_until_ready(self._state)

    def _idle_logits(self, num_rows: int) -> jax.Array:
        shards = self._mesh.shape["tensor"]
        shape = num_rows, shards * shard_width(self._model.config.vocab_size, shards)
        sharding = NamedSharding(self._mesh, VOCABULARY_SPEC)
        return jax.make_array_from_callback(shape, sharding, lambda index: np.zeros((num_rows, shape[1] // shards), np.float32))

    def _idle_arrays(self, key: ProgramKey) -> list[np.ndarray]:
        """What the host would send up for nobody."""
        num_groups = len(self._plan.num_pages)
        match key.kind, key.shape:
            case _, Bucket() as bucket:
                packer = BatchPacker(self._config.max_batch_size, num_groups, self._config.page_size)
                return [packer.padding(BatchLayout.of(bucket, num_groups, self._config.page_size))]
            case "mask", int(num_rows):
                return [np.full((num_rows, mask_words(self._model.config.vocab_size)), 0xFFFFFFFF, np.uint32)]
            case _, int():
                return []
            case "score", _:
                return [np.zeros((2, num_scored_a_call(self._platform)), np.int32)]
            case kind, _:
                shapes = {
                    "copy_pages": (num_groups, 2, PAGE_COPIES),
                    "load_slot": (SLOT_LOAD_SIZE,),
                    "add_page_entries": (PAGE_ENTRIES, 2 + num_groups),
                }
                return [np.full(shapes[kind], _NOWHERE, np.int32)]
