"""A process that lowers programs for another one, without its devices: `python -m jaxserve.runner.lowering_process`.

Such a process reads lines of JSON, {"blueprint", "name", "folder", "file"}, writes the lowered program into the folder and answers
each with {"error", "seconds"}: null where it succeeded, and CPU time. It ends when its input does, so also when the process that started
it dies.
"""

import importlib
import json
import sys
import time
import types
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import jax

from jaxserve.runner.blueprint import Blueprint
from jaxserve.runner.lowering import lower
from jaxserve.runner.program_store import ProgramStore
from jaxserve.runner.programs import Programs

_NO_DIALECT = "jaxlib.mlir.dialects.tt"


def serve(tasks: IO[str], answers: IO[str]) -> None:
    """Be such a process."""
    blueprint, programs, names, told = "", None, {}, 0.0
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


if __name__ == "__main__":
    # Whatever else is printed must not look like an answer.
    answers, sys.stdout = sys.stdout, sys.stderr
    # While there is nothing to do yet: what kernels import when the first of them is lowered.
    importlib.import_module("jax.experimental.pallas.mosaic_gpu")
    importlib.import_module("jax.experimental.pallas.triton")
    # jaxlib has Triton's dialect elsewhere than where MLIR looks for it, 1400 times a program, with each operation anew: up to 0.5 s.
    sys.modules.setdefault(_NO_DIALECT, types.ModuleType(_NO_DIALECT))
    serve(sys.stdin, answers)
