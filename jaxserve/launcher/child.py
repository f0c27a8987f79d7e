"""What a child process shares with the launcher: a socket pair, over which options come as JSON and news go as JSON lines.

The end of the socket tells a child that the launcher is gone, however it died: it removes the run folder and ends at once.
"""

import ctypes
import json
import logging
import os
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

from jaxserve.config import EngineOptions, HostOptions, ModelOptions, ServerOptions
from jaxserve.errors import GenerationFailed, StartupError
from jaxserve.launcher.logs import set_up_logging

PR_SET_PDEATHSIG = 1
EXIT_STARTUP_ERROR = 3  # the reason was told; starting again would not help
EXIT_FAILED = 4  # the reason was told; starting again may help
EXIT_ORPHANED = 5
FILES_FACT = "the model's files"  # what hosts compare
ONE_HOST = HostOptions(num_hosts=1)


@dataclass(frozen=True, slots=True)
class ChildOptions:
    """All that a child is told.

    Attributes:
        run_folder: sockets and metrics.
        index: replica of an engine, number of an http process.
        hosts: of an engine or worker those that share its replica; of an http process all of them, as discovered.
        address: the IP address at which an engine listens for another host's http processes; "" where they are on this one.
        compares_files: whether an engine tells what is in its model's files, because hosts compare them.
    """

    run_folder: str
    index: int
    model: ModelOptions
    engine: EngineOptions
    server: ServerOptions
    hosts: HostOptions = ONE_HOST
    address: str = ""
    compares_files: bool = False

    def to_json(self) -> bytes:
        """One line."""
        return json.dumps(asdict(self)).encode() + b"\n"

    @staticmethod
    def from_json(line: bytes) -> "ChildOptions":
        """Read what to_json() wrote."""
        values: dict[str, Any] = json.loads(line)
        server = values["server"] | {"cors_allow_origin": tuple(values["server"]["cors_allow_origin"])}
        return ChildOptions(
            values["run_folder"],
            values["index"],
            ModelOptions(**values["model"]),
            EngineOptions(**values["engine"]),
            ServerOptions(**server),
            HostOptions(**values["hosts"]),
            values["address"],
            values["compares_files"],
        )


class Control:
    """A child's end of the socket pair.

    Args:
        descriptor: inherited from the launcher.

    Attributes:
        options: what the launcher told.
    """

    def __init__(self, descriptor: int):
        self._socket = socket.socket(fileno=descriptor)
        reader = self._socket.makefile("rb")
        line = reader.readline()
        if not line:
            os._exit(EXIT_ORPHANED)
        self.options = ChildOptions.from_json(line)
        self._watching = threading.Thread(target=self._watch, args=(reader,), name="launcher-watch", daemon=True)
        self._watching.start()

    def tell_ready(self, **news: Any) -> None:
        """The process can do its work."""
        self._tell(event="ready", **news)

    def tell_found(self, files: str) -> None:
        """An engine has found its model's files; `files` is their fingerprint."""
        self._tell(event="found", files=files)

    def tell_dismissed(self) -> None:
        """The process ends because its work is done."""
        self._tell(event="dismissed")

    def tell_failed(self, reason: str) -> None:
        """The process cannot start or go on; one line."""
        self._tell(event="failed", reason=reason)

    def _tell(self, **news: Any) -> None:
        try:
            self._socket.sendall(json.dumps(news).encode() + b"\n")
        except OSError:
            self._orphaned()

    def _watch(self, reader: Any) -> None:
        try:
            while reader.readline():
                pass
        except OSError:
            pass
        self._orphaned()

    def _orphaned(self) -> NoReturn:
        shutil.rmtree(self.options.run_folder, ignore_errors=True)
        os._exit(EXIT_ORPHANED)


def run_child(arguments: Sequence[str], run: Callable[[Control], None]) -> int:
    """Be a child process: take the options, run, and tell the launcher why it could not be.

    Args:
        arguments: of the command line: the descriptor of the socket.
        run: the process's work; SIGINT is left to the launcher.

    Returns:
        the exit code.
    """
    control = Control(int(arguments[0]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    set_up_logging(control.options.server.json_output, control.options.server.log_level)
    logging.getLogger(__name__).info("the process has begun")
    code = 0
    try:
        run(control)
    except StartupError as error:
        control.tell_failed(" ".join(str(error).split()))
        code = EXIT_STARTUP_ERROR
    except GenerationFailed as error:
        control.tell_failed(" ".join(str(error).split()))
        code = EXIT_FAILED
    if control.options.hosts.span_hosts:
        # JAX would wait for the other hosts, and a thread may hang in a step that they have left.
        logging.shutdown()
        os._exit(code)
    return code


def die_with_parent() -> None:
    """Let the kernel kill this process when the launcher ends, even where it is stuck in native code (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
