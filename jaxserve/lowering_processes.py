"""LoweringProcesses: processes that lower programs beside this one (`runner/lowering_process.py`). Never imports jax.

They take as long to start as to lower a few programs, so whoever starts an engine may start them before JAX is imported.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from queue import SimpleQueue

COMMAND = (sys.executable, "-m", "jaxserve.runner.lowering_process")


class LoweringFailed(Exception):
    """A process could not lower a program; one line."""


class LoweringProcesses:
    """Some processes, started at once; each lowers one program at a time.

    Args:
        count: how many.
        command: what runs one.

    Attributes:
        count: how many.
    """

    def __init__(self, count: int, command: Sequence[str] = COMMAND):
        self.count = count
        path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
        without_gpus = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
        self._processes = [
            subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # what went wrong comes as an answer
                text=True,
                env={**os.environ, "PYTHONPATH": path, **without_gpus},
            )
            for _ in range(count)
        ]
        self._idle: SimpleQueue[subprocess.Popen[str]] = SimpleQueue()
        for process in self._processes:
            self._idle.put(process)

    def lower(self, blueprint: str, name: str, folder: Path, file: str) -> float:
        """Lower a program into a file of a store, as soon as a process is idle. To be called by several threads at once.

        Args:
            blueprint: as JSON.
            name: of the program.
            folder, file: of the store, and the name there.

        Returns:
            seconds of CPU time; with the first program of a process its start.

        Raises:
            LoweringFailed: it is not there.
        """
        process = self._idle.get()
        try:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(json.dumps({"blueprint": blueprint, "name": name, "folder": str(folder), "file": file}) + "\n")
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
        """End the processes, whatever they do. May be called again."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.communicate()
        self._processes = []
