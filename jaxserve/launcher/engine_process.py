"""An engine process: one replica of the engine, behind a unix socket, or a port of its own where http processes are on another host.

`python -m jaxserve.launcher.engine_process DESCRIPTOR`
"""

import asyncio
import contextlib
import functools
import gc
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from jaxserve.config import EXECUTABLES_FOLDER, EngineOptions, ModelOptions, limit_gpu_memory
from jaxserve.errors import GenerationFailed
from jaxserve.launcher.child import Control, die_with_parent, run_child
from jaxserve.launcher.devices import visible_gpus
from jaxserve.launcher.run_folder import engine_socket, model_file
from jaxserve.lowering_processes import LoweringProcesses, processes_for
from jaxserve.rpc.handshake import StreamKey
from jaxserve.rpc.server import EngineServer, ServedEngine

logger = logging.getLogger("jaxserve.launcher.engine_process")  # which is __main__

FAILURE_POLL_INTERVAL = 0.1  # seconds
FLUSH_TIME = 0.5  # seconds that http processes have to hear the last outputs


class RunningEngine(ServedEngine, Protocol):
    """An engine that can end (engine.AsyncEngine is one)."""

    def drain(self, timeout: float) -> bool:
        """Wait until nothing runs."""
        ...

    def close(self) -> None:
        """End what runs."""
        ...


type BuildEngine = Callable[[ModelOptions, EngineOptions, int], RunningEngine]


def main(arguments: Sequence[str], build: BuildEngine | None = None) -> int:
    """Run an engine process.

    Args:
        arguments: of the command line, see child.run_child.
        build: makes the engine; None for the real one.

    Returns:
        the exit code.
    """
    return run_child(arguments, lambda control: _run(control, build or functools.partial(_build_engine, control)))


def _build_engine(control: Control, model: ModelOptions, engine: EngineOptions, replica: int) -> RunningEngine:
    begin = time.monotonic()
    processes = _begin_with_lowering(engine)
    _begin_with_devices(engine)
    from jaxserve.engine import build_async_engine  # late: it imports jax

    logger.info("the engine is imported after %.1f s", time.monotonic() - begin)

    return build_async_engine(model, engine, replica, found=functools.partial(tell_found, control), processes=processes)


def tell_found(control: Control, path: Path, fingerprint: Callable[[], str]) -> None:
    """Tell http processes where the model's files are, and a launcher with other hosts what is in them."""
    told = model_file(Path(control.options.run_folder))
    whole = told.with_name(f"{told.name}.{os.getpid()}")
    whole.write_text(str(path))
    whole.replace(told)
    if control.options.compares_files:
        control.tell_found(fingerprint())


def _begin_with_lowering(engine: EngineOptions) -> LoweringProcesses | None:
    """Processes that import JAX while this one does, where this is the first start with its cache and there is a GPU to compile for."""
    kept = engine.compilation_cache / EXECUTABLES_FOLDER
    if (kept.is_dir() and any(kept.iterdir())) or os.environ.get("JAX_PLATFORMS") == "cpu" or not visible_gpus(os.environ):
        return None
    return LoweringProcesses(processes_for(len(os.sched_getaffinity(0))))


def _begin_with_devices(engine: EngineOptions) -> None:
    """Have JAX find its devices in a thread while all else is imported: of GPUs it takes up to seconds.

    Their memory is not taken there: until it is, which also takes seconds, a GPU does not say how much it has, and without knowing that no
    program can be prepared. What goes wrong there goes wrong again where the devices are first needed, and is told then.
    """
    limit_gpu_memory(engine)
    import jax  # whole before the thread begins: two threads that import a package at once may find half of it

    def find() -> None:
        with contextlib.suppress(Exception):
            jax.local_devices()

    threading.Thread(target=find, name="devices", daemon=True).start()


def _run(control: Control, build: BuildEngine) -> None:
    die_with_parent()
    options = control.options
    # The launcher showed this process only its own devices, so their numbers begin at 0.
    engine = build(options.model, options.engine, 0)
    # What was built lasts as long as the process: the collector need not look through it again between steps.
    gc.collect()
    gc.freeze()
    try:
        asyncio.run(_serve(control, engine))
    finally:
        engine.close()


async def _serve(control: Control, engine: RunningEngine) -> None:
    told_to_end = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told_to_end.set)
    await serve(control, engine, told_to_end)


async def serve(control: Control, engine: RunningEngine, told_to_end: asyncio.Event) -> None:
    """Serve an engine until the process is told to end.

    Raises:
        GenerationFailed: the engine failed.
    """
    options = control.options
    if options.address:
        server = EngineServer(engine, options.address, StreamKey(options.hosts.cluster_secret, options.index))
    else:
        server = EngineServer(engine, engine_socket(Path(options.run_folder), options.index))
    await server.start()
    control.tell_ready(address=server.address)
    while engine.failure is None and not told_to_end.is_set():
        try:
            await asyncio.wait_for(told_to_end.wait(), FAILURE_POLL_INTERVAL)
        except TimeoutError:
            continue
    if engine.failure is None:
        # On host 0 the http processes have ended. Those of another host's engine go on: they send no more, and what runs is finished.
        server.leave()
        await asyncio.to_thread(engine.drain, options.server.graceful_termination_timeout if options.address else FLUSH_TIME)
    else:
        await asyncio.sleep(FLUSH_TIME)
    await server.stop(FLUSH_TIME)
    if engine.failure is not None:
        raise GenerationFailed(engine.failure)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
