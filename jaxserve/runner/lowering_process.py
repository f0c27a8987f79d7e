"""Processes that lower programs beside this one, without its devices: `python -m jaxserve.runner.lowering_process`.

Such a process reads lines of JSON, {"blueprint", "name", "folder", "file"}, writes the lowered program into the folder and answers
each with {"error", "seconds"}: null where it succeeded, and CPU time. It ends when its input does, so also when the process that started
it dies.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any

import jax

from jaxserve.runner.blueprint import Blueprint
from jaxserve.runner.lowering import lower
from jaxserve.runner.program_store import ProgramStore
from jaxserve.runner.programs import Programs


class LoweringFailed(Exception):
    """A process could not lower a program; one line."""


class LoweringProcesses:
    """Some processes, started at once; each lowers one program at a time.

    Args:
        count: how many.
        folder: of the store that they write into.
    """

    def __init__(self, count: int, folder: Path):
        self._folder = folder
        self._processes = [subprocess.Popen(**_command()) for _ in range(count)]
        self._idle: SimpleQueue[subprocess.Popen[str]] = SimpleQueue()
        for process in self._processes:
            self._idle.put(process)

    def lower(self, blueprint: Blueprint, name: str, file: str) -> float:
        """Lower a program of a blueprint into a file of the store, as soon as a process is idle. To be called by several threads at once.

        Returns:
            seconds of CPU time; with the first program of a process its start.

        Raises:
            LoweringFailed: it is not there.
        """
        task = {"blueprint": blueprint.to_json(), "name": name, "folder": str(self._folder), "file": file}
        process = self._idle.get()
        try:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(json.dumps(task) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except OSError:
            answer = ""
        finally:
            self._idle.put(process)
        if not answer:
            raise LoweringFailed("the process died")
        told = json.loads(answer)
        if told["error"] is not None:
            raise LoweringFailed(told["error"])
        return told["seconds"]

    def close(self) -> None:
        """End the processes, whatever they do."""
        for process in self._processes:
            process.kill()
            process.communicate()


def _command() -> dict[str, Any]:
    path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {
        **os.environ,
        "PYTHONPATH": path,
        "JAX_PLATFORMS": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    }
    return dict(
        args=[sys.executable, "-m", "jaxserve.runner.lowering_process"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # what went wrong comes as an answer
        text=True,
        env=environment,
    )


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
    serve(sys.stdin, answers)
