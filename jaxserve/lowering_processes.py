"""LoweringProcesses: processes that lower programs beside this one (`runner/lowering_process.py`). Never imports jax.

They take as long to start as to lower a few programs, so one process imports what all need and is then forked; and whoever starts an
engine may start them before JAX is imported.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import IO

COMMAND = (sys.executable, "-m", "jaxserve.runner.lowering_process")


def processes_for(num_cores: int) -> int:
    """How many suit a machine: while they lower there is little else to do but compiling kernels, which comes in bursts."""
    return max(1, 3 * num_cores // 4)


class LoweringFailed(Exception):
    """A process could not lower a program; one line."""


class LoweringProcesses:
    """Some processes, started at once; each lowers one program at a time.

    Args:
        count: how many.
        command: what runs them, followed by the numbers of the sockets that they are to listen to, one each.

    Attributes:
        count: how many.
    """

    def __init__(self, count: int, command: Sequence[str] = COMMAND):
        self.count = count
        path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
        without_gpus = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
        one_thread = {"OPENBLAS_NUM_THREADS": "1"}  # numpy's library would start threads, and a fork takes one alone along
        pairs = [socket.socketpair() for _ in range(count)]
        theirs = [end.fileno() for _, end in pairs]
        self._process = subprocess.Popen(
            [*command, *map(str, theirs)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # what went wrong comes as an answer
            env={**os.environ, "PYTHONPATH": path, **without_gpus, **one_thread},
            pass_fds=theirs,
            process_group=0,  # so that it is ended with those forked from it
        )
        self._lines: list[IO[str]] = []
        self._idle: SimpleQueue[IO[str]] = SimpleQueue()
        for ours, end in pairs:
            end.close()
            lines = ours.makefile("rw")
            ours.close()  # `lines` holds it
            self._lines.append(lines)
            self._idle.put(lines)

    def lower(self, blueprint: str, name: str, folder: Path, file: str) -> float:
        """Lower a program into a file of a store, as soon as a process is idle. To be called by several threads at once.

        Args:
            blueprint: as JSON.
            name: of the program.
            folder, file: of the store, and the name there.

        Returns:
            seconds of CPU time; with the first program of one of them the start of all.

        Raises:
            LoweringFailed: it is not there.
        """
        lines = self._idle.get()
        try:
            lines.write(json.dumps({"blueprint": blueprint, "name": name, "folder": str(folder), "file": file}) + "\n")
            lines.flush()
            answer = lines.readline()
        except (OSError, ValueError):  # the latter when it is closed meanwhile
            answer = ""
        finally:
            self._idle.put(lines)
        if not answer:
            raise LoweringFailed("the process died")
        told = json.loads(answer)
        if told["error"] is not None:
            raise LoweringFailed(told["error"])
        return told["seconds"]

    def close(self) -> None:
        """End the processes, whatever they do. May be called again."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        for lines in self._lines:
            with contextlib.suppress(OSError):  # what was written and not sent
                lines.close()
        self._lines = []
