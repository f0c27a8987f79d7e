"""The launcher: starts the processes, waits until they are ready, restarts those that die, and ends them."""

import asyncio
import contextlib
import functools
import logging
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxserve.config import EngineOptions, HostOptions, ModelOptions, ServerOptions
from jaxserve.errors import StartupError
from jaxserve.hosts.placement import Placement, place
from jaxserve.launcher.bytecode import OF_ENGINE, OF_HTTP, bytecode_environment
from jaxserve.launcher.child import ONE_HOST, ChildOptions
from jaxserve.launcher.devices import device_environment
from jaxserve.launcher.listening import listen, num_http_processes
from jaxserve.launcher.logs import set_up_logging
from jaxserve.launcher.process import ChildProcess
from jaxserve.launcher.run_folder import make_run_folder, metrics_folder

if TYPE_CHECKING:
    from jaxserve.launcher.fellow_hosts import FellowHosts

logger = logging.getLogger(__name__)

MAX_DEATHS = 3
DEATH_WINDOW = 300.0  # seconds
FIRST_BACKOFF = 0.5  # seconds, doubled with every death in the window
MAX_BACKOFF = 60.0  # seconds
FAREWELL_TIME = 2.0  # seconds http processes have to tell their clients that it is over, where the launcher gives up
END_TIME = 10.0  # seconds an engine has to end
EXTRA_TIME = 5.0  # seconds beyond the graceful termination timeout before http processes are killed

ENGINE_COMMAND = (sys.executable, "-m", "jaxserve.launcher.engine_process")
HOST_COMMAND = (sys.executable, "-m", "jaxserve.launcher.host_process")
HTTP_COMMAND = (sys.executable, "-m", "jaxserve.launcher.http_process")


def launch(
    model: ModelOptions,
    engine: EngineOptions,
    server: ServerOptions,
    engine_command: Sequence[str] = ENGINE_COMMAND,
    hosts: HostOptions = ONE_HOST,
) -> int:
    """Serve until told to stop.

    Args:
        hosts: that serve together, as discovered; another host than 0 runs a worker, and serves no HTTP.
        engine_command: what runs an engine process.

    Returns:
        the exit code: 0 after SIGTERM or SIGINT, 1 where serving became impossible (one line on stderr says why), 128 + the signal
        where a second one cut the end short.
    """
    set_up_logging(server.json_output, server.log_level)
    num_http = server.http_workers or num_http_processes(engine.data_size, len(os.sched_getaffinity(0)))
    server = replace(server, http_workers=num_http)
    listening: list[socket.socket] = []
    metrics: socket.socket | None = None
    try:
        if hosts.leads:
            listening = listen(server.hostname, server.port, num_http)
            # One process answers for all of them.
            metrics = None if server.prometheus_port is None else listen(server.hostname, server.prometheus_port, 1)[0]
        placement = place(engine, hosts)
        count = len(placement.replicas)
        environments = [device_environment(engine, number, os.environ, count=count) for number in range(count)]
    except StartupError as error:
        return _fail(str(error))
    folder, lock = make_run_folder()
    try:
        metrics_folder(folder).mkdir()
        command = HOST_COMMAND if placement.span > 1 else engine_command
        fellows = None
        if hosts.span_hosts and engine.data_size > 1:  # hosts of one replica speak to each other in the processes that run it
            from jaxserve.launcher.fellow_hosts import FellowHosts  # late: a launcher of one host needs no gRPC

            fellows = FellowHosts(folder, model, engine, hosts)
        return asyncio.run(
            _Launcher(folder, listening, metrics, model, engine, server, hosts, placement, fellows, command, environments).run()
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


class _Launcher:
    def __init__(
        self,
        folder: Path,
        listening: Sequence[socket.socket],
        metrics: socket.socket | None,
        model: ModelOptions,
        engine: EngineOptions,
        server: ServerOptions,
        hosts: HostOptions,
        placement: Placement,
        fellows: "FellowHosts | None",
        engine_command: Sequence[str],
        engine_environments: Sequence[dict[str, str]],
    ):
        self._started_at = time.monotonic()
        self._listening = [*listening, *([] if metrics is None else [metrics])]
        self._server = server
        self._hosts = hosts
        self._place = placement
        self._fellows = fellows
        self._mesh = engine.mesh
        of_http, of_engine = (bytecode_environment(engine.compilation_cache, os.environ, packages) for packages in (OF_HTTP, OF_ENGINE))
        self._http = [
            ChildProcess(
                f"http process {index}",
                HTTP_COMMAND,
                ChildOptions(str(folder), index, model, engine, server, hosts),
                {"PROMETHEUS_MULTIPROC_DIR": str(metrics_folder(folder)), **of_http},
                [each.fileno()] if index or metrics is None else [each.fileno(), metrics.fileno()],
            )
            for index, each in enumerate(listening)
        ]
        self._engines = [
            ChildProcess(
                f"engine {replica}" if placement.runs_engines else "worker",
                engine_command,
                ChildOptions(str(folder), replica, model, engine, server, hosts, compares_files=fellows is not None),
                {**environment, **of_engine},
                heard=functools.partial(self._hear, replica),
            )
            for replica, environment in zip(placement.replicas, engine_environments, strict=True)
        ]
        self._signals: list[signal.Signals] = []
        self._signalled = asyncio.Event()
        self._gave_up = asyncio.Event()
        self._dismissed = asyncio.Event()
        self._reason = ""

    async def run(self) -> int:
        """Serve; returns the exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._take_signal, number)
        children = [*self._engines, *self._http]  # the engine takes longest to start
        logger.info("starting %d http and %d engine processes", len(self._http), len(self._engines))
        tasks = [asyncio.create_task(self._supervise(child)) for child in children]
        tasks += [asyncio.create_task(self._tell_ready()), asyncio.create_task(self._stay_among_hosts())]
        for task in tasks:
            task.add_done_callback(self._look_at)
        try:
            await _first(self._signalled.wait(), self._gave_up.wait(), self._dismissed.wait())
            if self._dismissed.is_set():
                await self._end_engines(END_TIME)
                await self._leave_hosts()
                return 0
            if self._gave_up.is_set():
                self._accept_no_more()
                await asyncio.gather(_all_ended(self._http, FAREWELL_TIME), self._leave_hosts(self._reason))
                return _fail(self._reason)
            self._signalled.clear()
            await _first(self._drain(), self._signalled.wait(), self._gave_up.wait(), self._dismissed.wait())
            if self._gave_up.is_set():
                return _fail(self._reason)
            if self._signalled.is_set():
                return 128 + self._signals[1]
            await self._leave_hosts()
            return 0
        finally:
            for task in tasks[len(children) :]:
                task.cancel()
            for child in children:
                child.signal(signal.SIGKILL)
            for child in children:
                await child.ended.wait()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            # The handlers go with the event loop; a signal after that would end this process before the run folder is removed.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})

    def _take_signal(self, number: signal.Signals) -> None:
        self._signals.append(number)
        self._signalled.set()

    @property
    def _ending(self) -> bool:
        return bool(self._signals) or self._gave_up.is_set() or self._dismissed.is_set()

    def _accept_no_more(self) -> None:
        for child in self._http:
            child.signal(signal.SIGTERM)
        for each in self._listening:
            each.close()

    async def _drain(self) -> None:
        """Accept no more, let what runs finish, then end the engines. A worker ends when the engine does that tells it what to run."""
        if not self._place.runs_engines:
            logger.info("ending: as soon as host %d ends", (self._hosts.host_index or 0) - self._place.index)
            await _all_ended(self._engines, self._server.graceful_termination_timeout + EXTRA_TIME + END_TIME)
            return
        logger.info("ending: no more requests are accepted; those that run may take %d s", self._server.graceful_termination_timeout)
        if self._hosts.leads:
            self._accept_no_more()
            await _all_ended(self._http, self._server.graceful_termination_timeout + EXTRA_TIME)
            await self._end_engines(END_TIME)
        else:  # engines on other hosts than the http processes see to it themselves
            await self._end_engines(self._server.graceful_termination_timeout + END_TIME)

    async def _end_engines(self, timeout: float) -> None:
        for child in self._engines:
            child.signal(signal.SIGTERM)
        await _all_ended(self._engines, timeout)

    async def _stay_among_hosts(self) -> None:
        """Serve with the other hosts until that is over."""
        if self._fellows is None:
            return
        if reason := await self._fellows.stay():
            self._give_up(reason)
        elif not self._hosts.leads:
            self._dismissed.set()

    async def _leave_hosts(self, reason: str = "") -> None:
        if self._fellows is not None:
            await self._fellows.close(reason)

    def _hear(self, replica: int, news: dict[str, Any]) -> None:
        if self._fellows is not None:
            self._fellows.heard(replica, news)

    async def _run_once(self, child: ChildProcess) -> str:
        """Run a child; returns what happened to it."""
        fellows = self._fellows if child in self._engines else None
        if fellows is not None:
            await fellows.placed.wait()
            child.options = replace(child.options, hosts=fellows.of_replica, address=fellows.address)
        try:
            return await child.run()
        except OSError as error:
            return f"cannot be started: {error}"
        finally:
            if fellows is not None:
                fellows.ended(child.options.index)

    async def _supervise(self, child: ChildProcess) -> None:
        """Run a child again and again.

        A child that cannot even start at first ends the server, for its options are at fault. One that died too often ends it only where
        no replica is left that serves: part of a server is worth more than none, and streams of the others must not break.
        """
        deaths: list[float] = []
        while not self._ending:
            fate = await self._run_once(child)
            if child.dismissed:
                return self._dismissed.set()
            if self._place.span > 1 and child in self._engines and not (self._ending and self._place.runs_engines):
                # The others cannot go on without it: whatever started all of them has to start them anew.
                return self._give_up(self._whose() + (fate if child.told_reason else self._fate_among_hosts(child, fate)))
            if self._ending:
                return
            if not child.ever_ready:
                return self._give_up(fate if child.told_reason else f"{child.name} {fate} before it was ready")
            now = time.monotonic()
            deaths = [at for at in deaths if at > now - DEATH_WINDOW] + [now]
            if len(deaths) >= MAX_DEATHS and not self._another_replica_serves(child):
                return self._give_up(f"{child.name} died {len(deaths)} times in {DEATH_WINDOW / 60:.0f} minutes; the last time it {fate}")
            backoff = min(FIRST_BACKOFF * 2 ** (len(deaths) - 1), MAX_BACKOFF)
            logger.error("%s %s; it is started again in %.1f s", child.name, fate, backoff)
            await asyncio.sleep(backoff)

    def _whose(self) -> str:
        """Of several replicas that span hosts, which one a reason is about: in it hosts are counted from the replica's first."""
        if self._fellows is None:
            return ""
        first = (self._hosts.host_index or 0) - self._place.index
        return f"replica {self._place.replicas[0]}, of hosts {first} to {first + self._place.span - 1}, here counted from 0: "

    def _fate_among_hosts(self, child: ChildProcess, fate: str) -> str:
        jax_does = "; JAX does that where another host is lost" if fate.endswith("SIGABRT") else ""
        return f"{child.name} {fate}{jax_does}"

    def _another_replica_serves(self, child: ChildProcess) -> bool:
        if child not in self._engines:
            return False
        elsewhere = self._fellows is not None and self._fellows.serves
        return elsewhere or any(engine.ready.is_set() for engine in self._engines if engine is not child)

    def _look_at(self, task: asyncio.Task[None]) -> None:
        """An error that nobody foresaw in what keeps the server together ends it: in silence it would serve half, or nothing."""
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("the launcher failed", exc_info=error)
            self._give_up(f"{type(error).__name__}: {' '.join(str(error).split())}")

    def _give_up(self, reason: str) -> None:
        self._reason = self._reason or reason
        self._gave_up.set()

    async def _tell_ready(self) -> None:
        for child in [*self._engines, *self._http]:
            await child.ready.wait()
        if self._fellows is not None:
            await self._fellows.join()
        seconds = time.monotonic() - self._started_at
        if not self._http:
            logger.info("ready: host %d of %d after %.1f s; host 0 serves", self._hosts.host_index, self._hosts.num_hosts, seconds)
            return
        news = self._http[0].news
        host, port = self._listening[0].getsockname()[:2]
        logger.info(
            "ready: %s on %s (mesh %s, %s) at http://%s:%d after %.1f s",
            *(news["model"], news["device"], self._mesh, news["dtype"], f"[{host}]" if ":" in host else host, port),
            seconds,
        )


async def _first(*awaitables: Coroutine[Any, Any, Any]) -> None:
    """Wait for the first and cancel the others."""
    tasks = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _all_ended(children: Sequence[ChildProcess], timeout: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout):
            for child in children:
                await child.ended.wait()


def _fail(reason: str) -> int:
    print(f"jaxserve: error: {reason}", file=sys.stderr, flush=True)
    return 1
