"""Processes that lower programs for another one, without its devices: `python -m jaxserve.runner.lowering_process SOCKET ...`.

One imports JAX and is forked, once for each socket. Such a process reads lines of JSON, {"blueprint", "name", "folder", "file"}, writes
the lowered program into the folder and answers each with {"error", "seconds"}: null where it succeeded, and CPU time. It ends when its
input does, so also when the process that started it dies.
"""

import importlib
import json
import os
import socket
import sys
import time
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import jax
from jax.extend.mlir import ir

from jaxserve.runner.blueprint import Blueprint
from jaxserve.runner.lowering import lower
from jaxserve.runner.program_store import ProgramStore
from jaxserve.runner.programs import Programs

_NO_DIALECT = "jaxlib.mlir.dialects.tt"
_NAME_OF_KERNEL = "mosaic_gpu.dump_basename"


def serve(tasks: IO[str], answers: IO[str], started: float = 0.0) -> None:
    """Be such a process.

    Args:
        started: seconds of CPU time that are told with the first program.
    """
    blueprint, programs, names, told = "", None, {}, -started
    for line in tasks:
        task: Mapping[str, str] = json.loads(line)
        try:
            if programs is None or task["blueprint"] != blueprint:
                blueprint = task["blueprint"]
                programs = Programs(Blueprint.from_json(blueprint))
                names = {key.name: key for key in programs}
                for option, value in programs.blueprint.trace_options:
                    jax.config.update(option, value)
            lowered = lower(programs[names[task["name"]]], programs.blueprint.platform)
            ProgramStore(Path(task["folder"])).write(task["file"], lowered)
            error = None
        except Exception as failure:  # the other process lowers it then, and shows the failure if it is one
            error = f"{type(failure).__name__}: {failure}"[:1000]
        seconds, told = time.process_time() - told, time.process_time()
        answers.write(json.dumps({"error": error, "seconds": seconds}) + "\n")
        answers.flush()


def fork(sockets: Sequence[int]) -> None:
    """Have a process serve each of these sockets, and wait until all have ended. There must be no other thread."""
    started, children = time.process_time(), []
    for number in sockets:
        if child := os.fork():
            children.append(child)
            continue
        try:
            for other in sockets:
                if other != number:  # kept open they would hide the end of whoever serves them
                    os.close(other)
            with socket.socket(fileno=number) as connection, connection.makefile("rw") as lines:
                serve(lines, lines, 0.0 if children else started)
        finally:
            os._exit(0)
    for number in sockets:
        os.close(number)
    for child in children:
        os.waitpid(child, 0)


def name_kernels_alike() -> None:
    """Have Mosaic name all kernels alike, instead of numbering them as they are lowered, where nobody asked for its files: the number is in
    a kernel's text, and by that XLA tells kernels apart. A decode step and a mixed one of as many tokens have most in common.
    """
    if any(name.startswith("MOSAIC_GPU_DUMP") for name in os.environ):
        return
    dialect = importlib.import_module("jax.experimental.mosaic.gpu").dialect
    numbered = dialect.get_or_set_dump_options

    def alike(module: ir.Module) -> object:
        module.operation.attributes[_NAME_OF_KERNEL] = ir.StringAttr.get("kernel", module.context)
        return numbered(module)

    dialect.get_or_set_dump_options = alike


if __name__ == "__main__":
    # While there is nothing to do yet: what kernels import when the first of them is lowered.
    importlib.import_module("jax.experimental.pallas.mosaic_gpu")
    importlib.import_module("jax.experimental.pallas.triton")
    # jaxlib has Triton's dialect elsewhere than where MLIR looks for it, 1400 times a program, with each operation anew: up to 0.5 s.
    sys.modules.setdefault(_NO_DIALECT, types.ModuleType(_NO_DIALECT))
    name_kernels_alike()
    fork([int(number) for number in sys.argv[1:]])
