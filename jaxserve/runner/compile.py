"""XLA's persistent cache, and counting what is compiled after the start."""

import math
import threading
from contextlib import AbstractContextManager

import jax
from jax import monitoring
from jax._src.config import persistent_cache_min_compile_time_secs  # a thread's own value; jax.config.update sets that of all

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"

CACHE_MISS_EVENT = "/jax/compilation_cache/cache_misses"
CACHE_HIT_EVENT = "/jax/compilation_cache/cache_hits"
# XLA's default, but said: so no older entry of its cache is found.
OF_ITS_OWN = {"xla_embed_ir_in_executable": False}


def use_compilation_cache(folder: str) -> None:
    """Keep compiled programs in a folder across processes; however small and quickly compiled, so that a warm start compiles nothing."""
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def keep_out_of_cache() -> AbstractContextManager[None]:
    """Within it this thread compiles without writing to that cache: it takes 0.35 s of the CPU for a program."""
    return persistent_cache_min_compile_time_secs(math.inf)


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


class CacheListener:
    """Hears of events in XLA's persistent cache, from start() to stop()."""

    def __init__(self) -> None:
        self._listening = False

    def start(self) -> None:
        """Begin to listen."""
        monitoring.register_event_listener(self._listen)
        self._listening = True

    def stop(self) -> None:
        """End it, where it has begun."""
        if self._listening:
            monitoring.unregister_event_listener(self._listen)
            self._listening = False

    def _listen(self, event: str, **kwargs: str | int) -> None:
        raise NotImplementedError


class CacheMisses(CacheListener):
    """Counts what was looked for in XLA's persistent cache and was not there, from start() to stop().

    Args:
        threads: how the names of the threads begin that count.
    """

    def __init__(self, threads: str) -> None:
        super().__init__()
        self.count = 0
        self._threads = threads

    def _listen(self, event: str, **kwargs: str | int) -> None:
        self.count += event == CACHE_MISS_EVENT and threading.current_thread().name.startswith(self._threads)


class CacheHits(CacheListener):
    """Knows which threads XLA's persistent cache gave a program, from start() to stop()."""

    def __init__(self) -> None:
        super().__init__()
        self._threads: set[int] = set()

    def take(self) -> bool:
        """Whether this thread was given one since it asked last."""
        hit = (thread := threading.get_ident()) in self._threads
        self._threads.discard(thread)
        return hit

    def _listen(self, event: str, **kwargs: str | int) -> None:
        if event == CACHE_HIT_EVENT:
            self._threads.add(threading.get_ident())
