"""Compiling ahead of time, and counting what is compiled later than that."""

from collections.abc import Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor

import jax
from jax import monitoring
from jax.stages import Compiled

from jaxserve.runner.programs import Program

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


def use_compilation_cache(folder: str) -> None:
    """Keep compiled programs in a folder across processes; however small and quickly compiled, so that a warm start compiles nothing."""
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def compile_programs[Key: Hashable](programs: Mapping[Key, Program], num_threads: int) -> dict[Key, Compiled]:
    """Trace one by one, which holds the GIL, and compile in threads, which does not.

    Returns:
        under the same keys the compiled programs, to be called with arrays of the declared shapes.
    """
    with ThreadPoolExecutor(num_threads, thread_name_prefix="compile") as pool:
        futures = {key: pool.submit(program.function.lower(*program.arguments).compile) for key, program in programs.items()}
        return {key: future.result() for key, future in futures.items()}


class CompileEvents:
    """Counts compilations in this process, by whomever, from start() on."""

    def __init__(self) -> None:
        self.count = 0

    def start(self) -> None:
        """Begin to count."""
        monitoring.register_event_duration_secs_listener(self._listen)

    def stop(self) -> None:
        """End it."""
        monitoring.unregister_event_duration_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        self.count += event == COMPILE_EVENT
