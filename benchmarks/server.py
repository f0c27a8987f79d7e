"""A server of its own for a benchmark: started, awaited, ended."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

ROOT = Path(__file__).resolve().parent.parent
POLL_INTERVAL = 0.02  # seconds
END_TIME = 60.0  # seconds
STATS_DELAY = 1.5  # seconds; engines tell their statistics every half second


class Server:
    """`python -m jaxserve` with some flags, from `with` to its end.

    Args:
        flags: of the server; --hostname and --port are given here.
        log: file that takes what the server says.
        start_timeout: seconds until it must be ready.

    Attributes:
        url: where it listens.
        ready_seconds: from the start of its process to the first 200 of /health.

    Raises:
        RuntimeError: it ended before it was ready, or was not in time; with the end of the log.
    """

    def __init__(self, flags: Sequence[str], log: Path, start_timeout: float = 300.0):
        self._flags = flags
        self._log = log
        self._start_timeout = start_timeout
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            self._port = listening.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"
        self.ready_seconds = 0.0

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", "jaxserve", *self._flags, "--hostname", "127.0.0.1", "--port", str(self._port)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
        begin = time.perf_counter()
        with open(self._log, "w") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            while not self._is_ready():
                if self._process.poll() is not None or time.perf_counter() - begin > self._start_timeout:
                    raise RuntimeError(f"the server is not ready; the end of its log:\n{self.log_end()}")
                time.sleep(POLL_INTERVAL)
        except BaseException:
            self.end()
            raise
        self.ready_seconds = time.perf_counter() - begin
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.end()

    def end(self) -> int:
        """SIGTERM, and SIGKILL where that does not help; returns the exit code."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(END_TIME)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def log_end(self, num_lines: int = 15) -> str:
        """The last lines of what the server said."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-num_lines:])

    def metrics(self) -> dict[str, float]:
        """/metrics as {name: value}, summed over labels, once the engines have told what they did up to now."""
        time.sleep(STATS_DELAY)
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as response:
            return sum_metrics(response.read().decode())

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as response:
                return response.status == 200
        except (urllib.error.URLError, OSError):
            return False


def sum_metrics(text: str) -> dict[str, float]:
    """Prometheus' text format as {name: value}, summed over labels."""
    values: dict[str, float] = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            name = name.split("{", 1)[0]
            values[name] = values.get(name, 0.0) + float(value)
    return values
