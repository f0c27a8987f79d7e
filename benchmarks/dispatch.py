"""The host's time for one decode step, and what it is spent on: microseconds by mesh.

    NCCL_NVLS_ENABLE=0 python -m benchmarks.dispatch FOLDER [--meshes 1x1 1x2] [--rows 64] [--trace] [--label 8b] [--results FILE]

FOLDER holds a config.json; the weights are random. Steps of some rows that nobody asked for, by the programs that serve. "Idle": the
devices have nothing else to do, so a call's time is the host's. "In turn": as an engine does it, the next step is dispatched before
the tokens of the one before are read. Programs that do nothing take the same arguments: what they cost is JAX's, not the model's.
Figures are medians. With --trace what the host's threads did in TRACED steps is told, and how long the devices' streams were busy;
CUDA graphs stay on, and the profiler makes all of it slower. On the CPU (fake devices) there are two programs a step.
"""

import argparse
import collections
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.profiler import ProfileData
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.rows import Rows, add_row_flags, command_line, make_rows
from jaxserve.config import EngineOptions, ModelOptions, limit_gpu_memory, parse_mesh
from jaxserve.models import Model
from jaxserve.runner import Executor, Preparation, RunnerConfig, make_mesh
from jaxserve.runner.batch import BatchLayout, BatchPacker
from jaxserve.runner.programs import ProgramKey
from jaxserve.runner.state import allocate_state
from jaxserve.weights import ModelSource
from jaxserve.weights.loader import open_model

KV_BYTES = 1 << 28
RUNS, TURNS, TRACED = 50, 200, 20
SHOWN = 14  # of a thread's events
GRAPHS_STAY_ON = "--xla_enable_command_buffers_during_profiling=true"


class Steps:
    """Steps for nobody, on one mesh."""

    def __init__(self, model: Model, mesh: Mesh, config: RunnerConfig):
        preparation = Preparation(model.architecture, model.dtype, mesh, config)
        self._executor = Executor(model, mesh, config, preparation)
        self._executor.warmup()
        buckets = preparation.buckets
        bucket = buckets.pick(config.max_batch_size, config.max_batch_size)
        self._key = ProgramKey("step" if bucket in buckets.whole else "forward", bucket)
        self._logit_rows = buckets.logit_rows(bucket)
        num_groups = len(self._executor.plan.num_pages)
        layout = BatchLayout.of(bucket, num_groups, config.page_size)
        self._packed = BatchPacker(config.max_batch_size, num_groups, config.page_size).padding(layout)

    @property
    def upload(self) -> np.ndarray:
        """What the host sends up for a step."""
        return self._packed

    @property
    def executor(self) -> Executor:
        """What runs them."""
        return self._executor

    def dispatch(self, kind: str = "step") -> jax.Array:
        """Start a step, of one program or of two ("forward"); its tokens, whose copy to the host has begun."""
        key = self._key if kind == "step" else self._key._replace(kind=kind)  # which is "forward" where there is no program for all of it
        tokens = self._executor.run(key, self._packed.copy())
        if key.kind == "forward":
            tokens = self._executor.run(ProgramKey("sample", self._logit_rows))
        assert tokens is not None
        tokens.copy_to_host_async()
        return tokens

    def idle(self, kind: str = "step") -> tuple[float, float]:
        """Microseconds of a step's calls, and until its tokens are on the host."""
        calls, whole = [], []
        for _ in range(RUNS):
            begin = time.perf_counter()
            tokens = self.dispatch(kind)
            calls.append(time.perf_counter() - begin)
            np.asarray(tokens)
            whole.append(time.perf_counter() - begin)
        return statistics.median(calls) * 1e6, statistics.median(whole) * 1e6

    def in_turn(self, count: int = TURNS, kind: str = "step") -> tuple[float, float]:
        """Microseconds of a step, and of its calls."""
        calls = []
        before = self.dispatch(kind)
        start = time.perf_counter()
        for _ in range(count):
            begin = time.perf_counter()
            tokens = self.dispatch(kind)
            calls.append(time.perf_counter() - begin)
            np.asarray(before)
            before = tokens
        np.asarray(before)
        return (time.perf_counter() - start) / count * 1e6, statistics.median(calls) * 1e6


def calls_for_nothing(model: Model, mesh: Mesh, steps: Steps, config: RunnerConfig) -> dict[str, float]:
    """Microseconds of calls whose programs do nothing, by what they take."""
    replicated, upload = NamedSharding(mesh, PartitionSpec()), steps.upload
    hidden = jax.ShapeDtypeStruct((config.max_batch_tokens, model.config.hidden_size), model.dtype)
    state = allocate_state(steps.executor.plan, config.max_batch_size, model.config.vocab_size, hidden, mesh)
    there = jax.device_put(upload, replicated)

    def compiled(function: Callable[..., Any], *arguments: Any, donated: tuple[int, ...] = ()) -> Any:
        shardings = (jax.tree.map(lambda x: x.sharding, arguments[0]), replicated) if donated else replicated
        return jax.jit(function, keep_unused=True, donate_argnums=donated, out_shardings=shardings).lower(*arguments).compile()

    one = compiled(lambda x: x + 1, there)
    leaves = compiled(lambda leaves, x: x + 1, model.leaves, there)
    through = compiled(lambda state, x: (state, x + 1), state, there, donated=(0,))

    def hand_through() -> jax.Array:
        nonlocal state
        state, result = through(state, there)
        return result

    return {
        "device_put of the upload": _median(lambda: jax.device_put(upload, replicated)),
        "make_array_from_callback of it": _median(lambda: jax.make_array_from_callback(upload.shape, replicated, lambda index: upload)),
        "a program that takes it": _median(lambda: one(there)),
        "the same, given the numpy array": _median(lambda: one(upload)),
        "device_put, then that program": _median(lambda: one(jax.device_put(upload, replicated))),
        f"with the {len(model.leaves)} weights": _median(lambda: leaves(model.leaves, there)),
        f"with the {len(jax.tree.leaves(state))} arrays of the state, donated": _median(hand_through),
    }


def _median(call: Callable[[], Any]) -> float:
    seconds = []
    for _ in range(RUNS + 3):
        begin = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - begin)
        jax.block_until_ready(result)
    return statistics.median(seconds[3:]) * 1e6


def tell_trace(steps: Steps) -> None:
    """Trace steps in turn; print what took the host's threads long, and how busy the devices were."""
    options = jax.profiler.ProfileOptions()
    options.host_tracer_level, options.python_tracer_level = 3, 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            steps.in_turn(TRACED)
        profile = ProfileData.from_file(str(next(Path(folder).rglob("*.xplane.pb"))))
    for plane in profile.planes:
        for line in plane.lines:
            events = [(event.name.partition("#")[0], event.duration_ns) for event in line.events]
            if plane.name.startswith("/device") and line.name.startswith("Stream"):
                busy = sum(duration for _, duration in events) / TRACED / 1e3
                print(f"{plane.name} {line.name}: {len(events) / TRACED:.1f} kernels and copies, busy {busy:,.0f} us a step", flush=True)
                if plane.name.endswith("0"):
                    _tell(f"{plane.name} {line.name}", events)
            if "CPU" in plane.name:
                _tell(f"thread {line.name}", events)


def _tell(name: str, events: Iterable[tuple[str, float]]) -> None:
    total: collections.Counter[str] = collections.Counter()
    count: collections.Counter[str] = collections.Counter()
    for event, duration in events:
        total[event] += round(duration)
        count[event] += 1
    if max(total.values(), default=0) < TRACED * 100_000:
        return
    print(f"{name}, us and times a step (a thread's events hold others)")
    for event, duration in total.most_common(SHOWN):
        print(f"  {duration / TRACED / 1e3:9.1f} {count[event] / TRACED:7.1f} x {event[:90]}", flush=True)


def measure(folder: Path, mesh_name: str, num_rows: int, trace: bool) -> dict[str, float]:
    """Microseconds by what they are of, on one mesh."""
    options = EngineOptions(
        prefix_caching=False,
        max_total_tokens=1024,
        max_batch_size=num_rows,
        max_batch_prefill_tokens=max(num_rows, 32),
        mesh=mesh_name,
        disable_grammar_support=True,
    )
    limit_gpu_memory(options)
    mesh = make_mesh(options.tensor_size)
    model = open_model(ModelSource("random", "", folder), ModelOptions(load_format="dummy"), mesh).load(mesh)
    platform = mesh.devices.flat[0].platform
    config = replace(RunnerConfig.from_options(options, platform, str(options.compilation_cache)), kv_bytes=KV_BYTES)
    steps = Steps(model, mesh, config)
    steps.in_turn()  # the first are slower
    found: dict[str, float] = dict(zip(("a step's calls, idle", "until its tokens are on the host, idle"), steps.idle(), strict=True))
    found["the same as two programs, idle"] = steps.idle("forward")[0]
    found |= dict(zip(("a step, in turn", "its calls, in turn"), steps.in_turn(), strict=True))
    found |= dict(zip(("as two programs, in turn", "its calls, in turn (two programs)"), steps.in_turn(kind="forward"), strict=True))
    found |= calls_for_nothing(model, mesh, steps, config)
    if trace:
        print(f"--mesh {mesh_name}, {TRACED} steps in turn under the profiler", flush=True)
        tell_trace(steps)
    steps.executor.close()
    return found


def main() -> None:
    """Read the arguments and measure."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--meshes", nargs="+", default=["1x1", "1x2"])
    parser.add_argument("--layers", type=int, default=0, help="of the model; 0: as config.json says")
    parser.add_argument("--rows", type=int, default=8, help="of a step; beyond 8 it is two programs")
    parser.add_argument("--label", default="", help="of the shape: rows are called tp2_LABEL_dispatch_us")
    parser.add_argument("--trace", action="store_true")
    add_row_flags(parser)
    arguments = parser.parse_args()
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {GRAPHS_STAY_ON}"
    shape = json.loads((arguments.folder / "config.json").read_text())
    shape["num_hidden_layers"] = arguments.layers or shape["num_hidden_layers"]
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(shape))
        for mesh in arguments.meshes:
            begin = time.perf_counter()
            found[mesh] = measure(Path(folder), mesh, arguments.rows, arguments.trace)
            print(f"--mesh {mesh}: {time.perf_counter() - begin:.0f} s", flush=True)
    rows = make_rows(arguments, jax.local_devices()[0].device_kind)
    add_rows(rows, found, arguments.label)
    print("us".ljust(52) + "".join(f"{mesh:>10s}" for mesh in found))
    for name in next(iter(found.values())):
        print(name.ljust(52) + "".join(f"{figures[name]:10,.0f}" for figures in found.values()))


def add_rows(rows: Rows, found: dict[str, dict[str, float]], label: str) -> None:
    """The figures that are kept: a step's calls, by mesh."""
    for mesh, figures in found.items():
        name = "_".join(filter(None, (f"tp{parse_mesh(mesh)[1]}", label, "dispatch_us")))
        rows.add(name, figures["a step's calls, idle"], "us", command_line("benchmarks.dispatch"))


if __name__ == "__main__":
    main()
