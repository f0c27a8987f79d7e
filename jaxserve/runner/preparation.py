"""Preparation: from a model's shape to the plan of its KV cache and its compiled programs, mostly before its weights are there."""

import hashlib
import logging
import math
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.stages import Compiled

from jaxserve.config import EXECUTABLES_FOLDER, LOWERED_FOLDER
from jaxserve.lowering_processes import LoweringFailed, LoweringProcesses, processes_for
from jaxserve.models import Architecture
from jaxserve.pallas_kernels import attention_dtype, page_dtype
from jaxserve.runner.blueprint import Blueprint
from jaxserve.runner.buckets import Buckets
from jaxserve.runner.compile import OF_ITS_OWN, CacheHits, CacheMisses, keep_out_of_cache, use_compilation_cache
from jaxserve.runner.config import RunnerConfig
from jaxserve.runner.exchange import exchange_bytes
from jaxserve.runner.executables import Executables, describe_compiler
from jaxserve.runner.hosts import Hosts, smallest
from jaxserve.runner.kernel_compilation import KernelCompilation, may_have_kernels
from jaxserve.runner.kv_cache import KVCachePlan, plan_kv_cache
from jaxserve.runner.lowering import compile_lowered, lower
from jaxserve.runner.memory import expected_temporaries, kv_cache_bytes
from jaxserve.runner.program_store import ProgramStore
from jaxserve.runner.programs import Program, ProgramKey, Programs
from jaxserve.runner.vocabulary import shard_width

logger = logging.getLogger(__name__)

# A start of an 8B leaves 300 MB of executables and 20 of lowered programs: a dozen sets of each.
_MOST_EXECUTABLES = 4 * 2**30  # bytes
_MOST_LOWERED = 256 * 2**20
_COMPILE_THREADS = "compile"
_SLOWEST_TOLD = 5  # programs
_SECONDS_UNTOLD = 10.0
HOSTS_FOLDER = "hosts"  # in the compilation cache's, with a folder for each set of programs
PROGRAMS_PER_PROCESS = 3  # a process takes as long to start as to lower these


class Preparation:
    """Begins at once, in threads and processes; plan() and finish() wait for it.

    Where an earlier start left compiled programs in the compilation cache, they are taken while the weights are loaded. Where it left
    lowered ones, nothing is traced: they are compiled, or taken from XLA's own cache, as hosts do that compile together. Otherwise programs
    are lowered by other processes where there is a GPU to wait for, else in a thread.

    The plan of the KV cache needs the temporaries of the largest program, and the programs need the plan. So the temporaries are expected,
    rather too large, and the largest program is compiled first; where it takes more, all begin anew. The weights may be loaded meanwhile:
    nothing is autotuned, which would leave holes between them.

    Where the mesh spans hosts, the KV cache is as large as the one with the least memory allows. On GPUs the leader alone compiles, and the
    others take what it compiled: autotuned apart, their programs could give other bits for what all devices compute alike, and in the end
    other tokens.

    Args:
        architecture, dtype: of the model.
        mesh: its devices.
        config: sizes.
        weights_to_come: bytes on each device.
        num_processes: that lower; None: what suits the machine, 0: none.
        processes: that lower, where they were started already; closed as soon as none is needed.
        hosts: those that the mesh spans, where they are several; they prepare at the same time.

    Raises:
        DeviceError: the KV cache does not fit.
    """

    def __init__(
        self,
        architecture: Architecture,
        dtype: Any,
        mesh: Mesh,
        config: RunnerConfig,
        weights_to_come: int = 0,
        num_processes: int | None = None,
        hosts: Hosts | None = None,
        processes: LoweringProcesses | None = None,
    ):
        self._architecture, self._dtype, self._mesh, self._config = architecture, dtype, mesh, config
        self._hosts, self._num_hosts = hosts, 1 if hosts is None else hosts.count
        self._shares = hosts is not None and mesh.devices.flat[0].platform == "gpu"
        folder = executables = None
        if config.compilation_cache_dir is not None:
            self._cache = Path(config.compilation_cache_dir)
            folder = self._cache / LOWERED_FOLDER
            executables = self._cache / EXECUTABLES_FOLDER if hosts is None else None
            if self._shares:
                # A folder of its own: what is in it is what the other hosts need.
                what = repr((architecture.config, architecture.attention, str(dtype), mesh.shape, config, self._num_hosts))
                self._cache = self._cache / HOSTS_FOLDER / hashlib.sha256(what.encode()).hexdigest()[:16]
            use_compilation_cache(str(self._cache))
        self._store = ProgramStore(folder)
        self._executables = Executables(executables, mesh)
        self._num_processes = num_processes
        self._processes = processes
        self._lowering: ThreadPoolExecutor | None = None
        self._kernels: KernelCompilation | None = None  # where there may be any
        self._compiling = ThreadPoolExecutor(_cores(), thread_name_prefix=_COMPILE_THREADS)
        # One: serializing a program holds the GIL for 0.15 s, for which all that compile would otherwise wait before they go on.
        self._keeping = ThreadPoolExecutor(1, thread_name_prefix="keep")
        self._kept: dict[ProgramKey, Future[None]] = {}
        self._futures: dict[ProgramKey, Future[Future[Compiled]]] = {}
        self._compile_seconds: dict[str, float] = {}
        self._lowering_seconds: list[float] = []  # of CPU time, in other processes
        self._told = time.monotonic()
        self._sharing: Future[None] | None = Future() if self._shares else None
        self._num_shared = 0
        self._misses, self._hits = CacheMisses(_COMPILE_THREADS), CacheHits()
        self._hits.start()
        to_come = weights_to_come + exchange_bytes(mesh, config)
        self._bytes_left = smallest(hosts, "bytes for the KV cache", kv_cache_bytes(mesh, config.kv_bytes, to_come))
        self._temporaries = 0
        self._file_of_temporaries: str | None = None  # where they have still to be measured
        if config.kv_bytes is None:
            blueprint = self._blueprint()
            state = Programs(blueprint).state
            # Beside the KV cache: the rest of the state, and a step's logits with masks applied.
            rest = jax.tree.leaves((state.sampling, state.hidden))
            beside = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in rest)
            logits = 4 * config.max_batch_size * shard_width(architecture.config.vocab_size, mesh.shape["tensor"])
            self._bytes_left -= beside + config.masked * logits
            name = blueprint.digest(f"temporaries {describe_compiler(mesh)}")  # XLA's choices are in them
            measured = self._leaders("temporaries", self._store.read(name) or b"")
            self._temporaries = max(int(measured or 0), expected_temporaries(blueprint))
            self._file_of_temporaries = None if measured else name
        self._programs = self._begin()

    @property
    def keys(self) -> list[ProgramKey]:
        """Of all programs, in the order of programs()."""
        return list(self._futures)

    @property
    def buckets(self) -> Buckets:
        """The shapes of steps."""
        return self._programs.buckets

    def plan(self) -> KVCachePlan:
        """The sizes of the KV cache, once the largest program is compiled. To be called when the weights are loaded."""
        if self._file_of_temporaries is not None:
            measured = int(self._leaders("temporaries of the largest program", str(self._measure() if self._leads else 0).encode()))
            self._store.write(self._file_of_temporaries, str(measured).encode())
            self._file_of_temporaries = None
            logger.info("temporaries: %.2f GiB, %.2f are kept for them", measured / 2**30, self._temporaries / 2**30)
            if measured > self._temporaries:
                self._temporaries = measured
                for future in self._futures.values():
                    future.cancel()
                self._programs = self._begin()
        return self._programs.plan

    def programs(self) -> Iterator[tuple[ProgramKey, Compiled]]:
        """All programs as they become ready, in an order that is the same on all hosts. Ends the preparation."""
        self.plan()
        try:
            if self._sharing is not None:
                self._misses.start()
                threading.Thread(target=self._share_programs, args=(self._sharing,), name="share", daemon=True).start()
                self._sharing.result()
            for key, lowered in self._futures.items():
                compiled = self._wait(self._wait(lowered))
                if key in self._kept:
                    self._wait(self._kept[key])  # XLA's CPU serializes no sort that has run
                yield key, compiled
            if self._sharing is not None and not self._leads and (missed := self._misses.count):
                logger.warning("%d programs had to be compiled here: XLA did not take host 0's", missed)
            slowest = sorted(self._compile_seconds.items(), key=lambda item: -item[1])[:_SLOWEST_TOLD]
            logger.info("slowest to compile: %s", ", ".join(f"{name} {seconds:.1f} s" for name, seconds in slowest))
            if self._lowering_seconds:
                logger.info("%d programs lowered in %.1f s of CPU time", len(self._lowering_seconds), sum(self._lowering_seconds))
            self._executables.clean(_MOST_EXECUTABLES)
            self._store.clean(_MOST_LOWERED)
        finally:
            self.close()

    def _wait[T](self, future: Future[T]) -> T:
        """Its result; says now and then how far all of them are."""
        while True:
            try:
                return future.result(timeout=max(0.0, self._told + _SECONDS_UNTOLD - time.monotonic()))
            except TimeoutError:
                if future.done():
                    raise
                self._told = time.monotonic()
                logger.info("%d of %d programs are compiled", len(self._compile_seconds), len(self._futures))

    def compile_again(self, keys: Sequence[ProgramKey], options: dict[str, Any]) -> dict[ProgramKey, Compiled]:
        """Compile programs with other options of XLA, after programs(). All hosts do it at the same time."""
        if not self._leads:
            self._share()
        compiled: dict[ProgramKey, Compiled] = {}
        for key in keys:
            program = self._programs[key]._replace(options=options)
            compiled[key] = self._compile(lower(program, self._programs.blueprint.platform), program)
        if self._leads:
            self._share()
        return compiled

    def close(self) -> None:
        """End its threads and processes, whatever they do."""
        self._misses.stop()
        self._hits.stop()
        for threads in (self._lowering, self._compiling, self._keeping):
            if threads is not None:
                threads.shutdown(wait=False, cancel_futures=True)
        self._close_processes()
        if self._kernels is not None:
            self._kernels.close()

    def _close_processes(self) -> None:
        if self._processes is not None:
            self._processes.close()
            self._processes = None

    def _begin(self) -> Programs:
        """Plan, and start to make all programs ready."""
        programs = Programs(self._blueprint())
        blueprint = programs.blueprint
        keys = list(programs)
        # All are asked for, also those that will not be read: what a start asks for counts as used.
        compiled = {key for key in keys if self._executables.has(blueprint, key)}
        lowered = {key for key in keys if self._store.has(blueprint.digest(key.name))} - compiled
        missing = len(keys) - len(compiled) - len(lowered)
        told = "an earlier start compiled %d programs and lowered %d more, %d are to be lowered"
        logger.info(told, len(compiled), len(lowered), missing)
        lowering = self._started_lowering(missing)
        self._programs = programs
        if self._kernels is not None:
            self._kernels.close()
        device = self._mesh.local_devices[0]
        compiles = may_have_kernels(device) and self._leads and len(compiled) < len(keys)
        self._kernels = KernelCompilation(device, len(keys) - len(compiled)) if compiles else None
        self._futures = {
            key: _finished(self._compiling.submit(self._load, programs, key))
            if key in compiled
            else lowering.submit(self._make_ready, programs, key, self._kernels)
            for key in keys
        }
        return programs

    def _load(self, programs: Programs, key: ProgramKey) -> Compiled:
        """What an earlier start compiled, or where that cannot be used the same anew."""
        begin = time.monotonic()
        compiled = self._executables.load(programs.blueprint, key, programs[key])
        if compiled is None:
            return self._compile_when_shared(self._lowered(programs, key), programs, key)
        self._compile_seconds[key.name] = time.monotonic() - begin
        return compiled

    def _make_ready(self, programs: Programs, key: ProgramKey, kernels: KernelCompilation | None) -> Future[Compiled]:
        try:
            lowered = self._lowered(programs, key)
        except Exception:
            if kernels is not None:
                kernels.begin(None)
            raise
        if kernels is not None:
            kernels.begin(lowered)
        return self._compiling.submit(self._compile_when_shared, lowered, programs, key, kernels)

    def _lowered(self, programs: Programs, key: ProgramKey) -> bytes:
        return self._store.read(programs.blueprint.digest(key.name)) or self._lower(programs, key)

    def _compile_when_shared(
        self, lowered: bytes, programs: Programs, key: ProgramKey, kernels: KernelCompilation | None = None
    ) -> Compiled:
        """On the leader as soon as all programs' kernels are compiled, on other hosts as soon as they have what the leader compiled."""
        if self._sharing is not None and not self._leads:
            self._sharing.result()
        if kernels is not None:
            kernels.wait()
        if programs is not self._programs:
            raise CancelledError  # all has begun anew
        begin = time.monotonic()
        program = programs[key]
        if not self._executables.kept:
            compiled = self._compile(lowered, program)
        else:
            self._hits.take()
            with keep_out_of_cache():
                compiled = self._compile(lowered, program._replace(options={**program.options, **OF_ITS_OWN}))
            if not self._hits.take():  # serialized a second time it would lack functions
                kept = self._keeping.submit(self._executables.keep, programs.blueprint, key, program, compiled)
                if programs is self._programs:
                    self._kept[key] = kept
        self._compile_seconds[key.name] = time.monotonic() - begin
        return compiled

    def _compile(self, lowered: bytes, program: Program) -> Compiled:
        if self._shares:
            # Otherwise the leader would wait until other hosts autotune a part of what it compiles alone.
            program = program._replace(options={**program.options, "xla_gpu_shard_autotuning": False})
        return compile_lowered(lowered, program, self._mesh)

    def _share_programs(self, shared: Future[None]) -> None:
        try:
            if self._leads:
                for future in self._futures.values():
                    future.result().result()
            self._share()
            shared.set_result(None)
        except BaseException as error:  # a CancelledError where the preparation was closed
            shared.set_exception(error)

    def _share(self) -> None:
        """Give the other hosts what this one compiled, or take it."""
        self._num_shared += 1
        if self._shares and self._hosts is not None:
            self._hosts.share_files(f"programs {self._num_shared}", self._cache)

    @property
    def _leads(self) -> bool:
        return self._hosts is None or self._hosts.index == 0

    def _leaders(self, topic: str, value: bytes) -> bytes:
        """The leader's value, a number or nothing."""
        return value if self._hosts is None else self._hosts.gather(topic, value.decode())[0].encode()

    def _measure(self) -> int:
        """Bytes of the largest program's temporaries."""
        analysis = self._wait(self._wait(self._futures[self._programs.largest()])).memory_analysis()
        assert analysis is not None, "XLA tells no memory analysis"
        return analysis.temp_size_in_bytes

    def _lower(self, programs: Programs, key: ProgramKey) -> bytes:
        blueprint = programs.blueprint
        file = blueprint.digest(key.name)
        if (processes := self._processes) is not None and self._store.folder is not None:
            try:
                self._lowering_seconds.append(processes.lower(blueprint.to_json(), key.name, self._store.folder, file))
            except LoweringFailed as failure:
                logger.warning("%s is lowered in this process: in another one: %s", key.name, failure)
            if (lowered := self._store.read(file)) is not None:
                return lowered
        lowered = lower(programs[key], blueprint.platform)
        self._store.write(file, lowered)
        return lowered

    def _started_lowering(self, num_programs: int) -> ThreadPoolExecutor:
        """What lowers, started once, for about this many programs."""
        if self._lowering is not None:
            return self._lowering
        count = self._num_processes
        if count is None:
            on_gpu = self._mesh.devices.flat[0].platform == "gpu"
            count = min(processes_for(_cores()), num_programs // PROGRAMS_PER_PROCESS) if on_gpu else 0
        if not (count and num_programs and self._store.folder is not None):
            self._close_processes()
        elif self._processes is None:
            self._processes = LoweringProcesses(count)
        # Without processes one thread: it holds the GIL.
        self._lowering = ThreadPoolExecutor(1 if self._processes is None else self._processes.count, thread_name_prefix="lower")
        return self._lowering

    def _blueprint(self) -> Blueprint:
        kv_bytes = max(self._bytes_left - self._temporaries, 0)
        wanted, platform = self._config.kv_dtype, self._mesh.devices.flat[0].platform
        dtype = attention_dtype(self._dtype) if wanted is None else page_dtype(jnp.dtype(wanted), platform)
        plan = plan_kv_cache(self._architecture.config, self._config, self._mesh.shape["tensor"], dtype, kv_bytes)
        return Blueprint.of(self._architecture, self._dtype, self._mesh, plan, self._config)


def _finished[T](result: T) -> Future[T]:
    future: Future[T] = Future()
    future.set_result(result)
    return future


def _cores() -> int:
    return len(os.sched_getaffinity(0))
