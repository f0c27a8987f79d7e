"""ChildProcess: one process of the server, started again and again as the launcher wants."""

import asyncio
import contextlib
import json
import os
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxserve.launcher.child import ChildOptions


class ChildProcess:
    """A place in the server that a process fills.

    Args:
        name: for people, "engine 0".
        command: program and arguments; the descriptor of its control socket and `descriptors` are put behind.
        options: what it is told.
        environment: variables beside those of the launcher.
        descriptors: to be inherited.
        heard: is told all its news.

    Attributes:
        options: what the next process is told.
        ready: set while the process says that it is; unset again when it ends.
        ever_ready: whether any process here got ready.
        news: what it told when it got ready.
        dismissed: whether the last process ended because its work was done.
        told_reason: whether the last process told itself why it ended.
        ended: set while no process runs.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        options: ChildOptions,
        environment: Mapping[str, str],
        descriptors: Sequence[int] = (),
        heard: Callable[[dict[str, Any]], None] = lambda news: None,
    ):
        self.name = name
        self.ready = asyncio.Event()
        self.ever_ready = False
        self.news: dict[str, Any] = {}
        self.told_reason = False
        self.dismissed = False
        self.ended = asyncio.Event()
        self.ended.set()
        self._command = tuple(command)
        self.options = options
        self._environment = {**os.environ, **environment}
        self._descriptors = tuple(descriptors)
        self._heard = heard
        self._pid = 0

    async def run(self) -> str:
        """Start a process and wait for its end.

        Returns:
            the reason that it told, else what happened to it, fit to stand behind its name: "was killed by SIGKILL".
        """
        here, there = socket.socketpair()
        with there:
            descriptors = (there.fileno(), *self._descriptors)
            process = await asyncio.create_subprocess_exec(
                *self._command,
                *map(str, descriptors),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=descriptors,
                start_new_session=True,  # a terminal's ^C is for the launcher alone
                env=self._environment,
            )
        self._pid = process.pid
        self.ended.clear()
        reason = ""
        try:
            reader, writer = await asyncio.open_connection(sock=here)
            with contextlib.suppress(ConnectionError):
                writer.write(self.options.to_json())
                while line := await reader.readline():
                    reason = self._hear(json.loads(line)) or reason
            code = await process.wait()
            writer.close()
        finally:
            self._pid = 0
            self.ready.clear()
            self.ended.set()
        self.told_reason = bool(reason)
        return reason or _describe(code)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process and whatever it started, if it runs."""
        if self._pid:
            with contextlib.suppress(ProcessLookupError):
                if number == signal.SIGKILL:
                    os.killpg(self._pid, number)
                else:
                    os.kill(self._pid, number)

    def _hear(self, news: dict[str, Any]) -> str:
        """Take what the process tells; returns the reason where it cannot go on."""
        if news["event"] == "failed":
            return news["reason"]
        if news["event"] == "dismissed":
            self.dismissed = True
        elif news["event"] == "ready":
            self.news = news
            self.ever_ready = True
            self.ready.set()
        self._heard(news)
        return ""


def _describe(code: int) -> str:
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"
