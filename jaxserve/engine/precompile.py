"""Filling the folder of compiled programs before a server needs them (`jaxserve compile`)."""

import time
from dataclasses import dataclass, replace
from pathlib import Path

from jax import monitoring

from jaxserve.config import EXECUTABLES_FOLDER, LOWERED_FOLDER, EngineOptions, ModelOptions
from jaxserve.engine.build import build_engine
from jaxserve.runner.executables import FOUND_EVENT, KEPT_EVENT
from jaxserve.runner.program_store import ProgramStore

_COMPILED_EVENTS = "/jax/compilation_cache/cache_misses", KEPT_EVENT
_FOUND_EVENTS = "/jax/compilation_cache/cache_hits", FOUND_EVENT


@dataclass(frozen=True, slots=True)
class Precompiled:
    """What was done.

    Attributes:
        folder: of compiled programs.
        num_compiled, num_found: programs that were compiled into it, and that it had already.
        seconds: of all of it.
    """

    folder: Path
    num_compiled: int
    num_found: int
    seconds: float


def precompile(model_options: ModelOptions, engine_options: EngineOptions) -> Precompiled:
    """Compile what a server with these options would, on random weights of the model's shape: its own are not read.

    It starts an engine as a server does, down to the sizes of the KV cache, because they are in the programs. So it needs the device
    that the server will have. All replicas of a mesh take the same programs. Later starts never delete what is prepared so.

    Raises:
        StartupError: one line says why.
    """
    begin, begin_of_files = time.monotonic(), time.time()
    counts = dict.fromkeys((*_COMPILED_EVENTS, *_FOUND_EVENTS), 0)

    def listen(event: str, **_: str | int) -> None:
        if event in counts:
            counts[event] += 1

    monitoring.register_event_listener(listen)
    try:
        build_engine(replace(model_options, load_format="dummy"), engine_options).close()
    finally:
        monitoring.unregister_event_listener(listen)
    for folder in (EXECUTABLES_FOLDER, LOWERED_FOLDER):
        ProgramStore(engine_options.compilation_cache / folder).keep_used(since=begin_of_files)
    seconds = time.monotonic() - begin
    compiled, found = (sum(counts[event] for event in events) for events in (_COMPILED_EVENTS, _FOUND_EVENTS))
    return Precompiled(engine_options.compilation_cache, compiled, found, seconds)
