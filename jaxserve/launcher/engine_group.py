"""EngineGroup: the engine processes of one process that is no launcher: a script's, or a replica of Ray Serve."""

import asyncio
import os
import shutil
import signal
from collections.abc import Callable, Mapping, Sequence

from jaxserve.config import EngineOptions, ModelOptions, ServerOptions
from jaxserve.errors import StartupError
from jaxserve.launcher.bytecode import OF_ENGINE, bytecode_environment
from jaxserve.launcher.child import ChildOptions
from jaxserve.launcher.devices import device_environment
from jaxserve.launcher.launcher import END_TIME, ENGINE_COMMAND
from jaxserve.launcher.process import ChildProcess
from jaxserve.launcher.run_folder import engine_socket, make_run_folder
from jaxserve.rpc.client import EngineClient
from jaxserve.rpc.router import Router

POLL_INTERVAL = 0.02  # seconds


class EngineGroup:
    """D engine processes and the router to them. One that ends is not started again; all end when the thread does that called start().

    Each is a new program, not a fork or a copy of this one: it runs nothing of the caller's script.

    Args:
        model, engine, server: options; the mesh says how many.
        command: what runs an engine process.
        environment: variables beside those of this process.

    Attributes:
        router: to the engines; started by start().
    """

    def __init__(
        self,
        model: ModelOptions,
        engine: EngineOptions,
        server: ServerOptions,
        command: Sequence[str] = ENGINE_COMMAND,
        environment: Mapping[str, str] | None = None,
    ):
        bytecode = bytecode_environment(engine.compilation_cache, os.environ, OF_ENGINE)
        environments = [device_environment(engine, replica, os.environ) for replica in range(engine.data_size)]
        self._folder, self._lock = make_run_folder()
        self._processes = [
            ChildProcess(
                f"engine {replica}",
                command,
                ChildOptions(str(self._folder), replica, model, engine, server),
                {**shown, **bytecode, **(environment or {})},
            )
            for replica, shown in enumerate(environments)
        ]
        clients = [EngineClient(engine_socket(self._folder, replica), replica) for replica in range(engine.data_size)]
        self.router = Router(clients, engine.prefix_caching)
        self._fates: dict[ChildProcess, asyncio.Task[str]] = {}

    async def start(self, given_up: Callable[[], bool] = lambda: False) -> None:
        """Start the processes and wait until they can be asked.

        Args:
            given_up: asked now and then whether to wait any longer.

        Raises:
            StartupError: one of them cannot start, and why, in one line; or it was given up.
        """
        self._fates = {process: asyncio.create_task(_run_once(process)) for process in self._processes}

        async def until(condition: Callable[[], bool]) -> None:
            while not condition():
                await asyncio.sleep(POLL_INTERVAL)
                if given_up():
                    raise StartupError("the start was broken off")
                for process, fate in self._fates.items():
                    if fate.done():
                        raise StartupError(fate.result() if process.told_reason else f"{process.name} {fate.result()} before it was ready")

        await until(lambda: all(process.ready.is_set() for process in self._processes))
        self.router.start()
        await until(lambda: all(client.available for client in self.router.clients))

    async def ends(self) -> list[str]:
        """Wait until a process has ended; returns what happened to each that has: "engine 0 was killed by SIGKILL"."""
        await asyncio.wait(self._fates.values(), return_when=asyncio.FIRST_COMPLETED)
        return [f"{process.name} {fate.result()}" for process, fate in self._fates.items() if fate.done()]

    async def end(self) -> None:
        """End the processes; what is in flight is lost."""
        await self.router.close()
        running = list(self._fates.values())
        for process in self._processes:
            process.signal(signal.SIGTERM)
        if running:
            _, late = await asyncio.wait(running, timeout=END_TIME)
            for process in self._processes if late else ():
                process.signal(signal.SIGKILL)
            await asyncio.gather(*running)

    def remove(self) -> None:
        """Remove the folder with the sockets. May be called again."""
        shutil.rmtree(self._folder, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


async def _run_once(process: ChildProcess) -> str:
    try:
        return await process.run()
    except OSError as error:
        return f"cannot be started: {error}"
