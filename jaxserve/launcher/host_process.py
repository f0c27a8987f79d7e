"""A process with the devices of one host, where a mesh spans several: host 0's engine, or another host's worker.

`python -m jaxserve.launcher.host_process DESCRIPTOR`. The event loop watches the other hosts while a thread of its own uses JAX, which may
hang for good in a step that another host has left.
"""

import asyncio
import functools
import gc
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from jaxserve.errors import GenerationFailed, HostsDisagree, HostsFailed, JaxserveError, StartupError
from jaxserve.hosts.addresses import resolve, use_interface_to
from jaxserve.hosts.leader import Leader
from jaxserve.hosts.wire import LOSS_TIME
from jaxserve.hosts.worker import Worker
from jaxserve.launcher.child import ChildOptions, Control, die_with_parent, run_child
from jaxserve.launcher.engine_process import serve, tell_found


def main(arguments: Sequence[str]) -> int:
    """Run a host's process; returns the exit code."""
    return run_child(arguments, _run)


def _run(control: Control) -> None:
    die_with_parent()
    asyncio.run(_lead(control) if control.options.hosts.leads else _work(control))


async def _lead(control: Control) -> None:
    options = control.options
    told_to_end = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told_to_end.set)
    address, port, count = await _find(options)
    leader = Leader(address, port, count, options.hosts.cluster_secret)
    await leader.start()
    try:
        building = _in_thread(lambda: _build_engine(control, leader))
        await _first(building, leader.failed.wait(), told_to_end.wait())
        if leader.failure is not None:
            raise HostsFailed(leader.failure)
        if building.done():
            engine = building.result()
            watching = asyncio.create_task(_pass_on_failure(leader, engine))
            await serve(control, engine, told_to_end)
            watching.cancel()
            engine.close()
    except JaxserveError as error:
        own = str(error) if isinstance(error, HostsDisagree) else f"host 0: {_one_line(error)}"
        await leader.end(leader.failure or own)
        raise
    await leader.end()


async def _pass_on_failure(leader: Leader, engine: Any) -> None:
    await leader.failed.wait()
    engine.fail(leader.failure)


def _build_engine(control: Control, leader: Leader) -> Any:
    leader.wait_for_all()
    from jaxserve.engine import build_async_engine  # late: it imports jax

    options = control.options
    engine = build_async_engine(options.model, options.engine, hosts=leader, found=functools.partial(tell_found, control))
    _keep_what_there_is()
    return engine


async def _work(control: Control) -> None:
    options = control.options
    # Alone it cannot end well: it ends when host 0 has finished what runs.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    address, port, count = await _find(options)
    worker = Worker(address, port, options.hosts.host_index or 0, count, options.hosts.cluster_secret)
    await worker.join()
    working = _in_thread(lambda: _run_calls(control, worker))
    listening = asyncio.create_task(worker.listen())
    await _first(working, listening)
    if working.done() and worker.failure is None:
        # A step fails here too where another host is lost, and the leader finds a disagreement too; that is soon known.
        error = working.exception()
        if isinstance(error, HostsDisagree) or not isinstance(error, JaxserveError):
            await asyncio.wait([listening], timeout=LOSS_TIME)
        if worker.failure is None:
            await worker.fail(reason := _one_line(error))
            raise error if isinstance(error, StartupError) else GenerationFailed(reason)
    if not worker.dismissed:
        raise HostsFailed(worker.failure)
    control.tell_dismissed()


def _run_calls(control: Control, worker: Worker) -> None:
    from jaxserve.engine import build_worker  # late: it imports jax

    executor = build_worker(control.options.model, control.options.engine, worker)
    _keep_what_there_is()
    control.tell_ready()
    while (call := worker.calls.get()) is not None:
        executor.replay(*call)


async def _find(options: ChildOptions) -> tuple[str, int, int]:
    """The address and port of host 0, and how many hosts there are."""
    hosts = options.hosts
    assert hosts.coordinator is not None and hosts.num_hosts is not None, "discovered before"
    address, port = await resolve(hosts.coordinator)
    use_interface_to(address, port)
    return address, port, hosts.num_hosts


def _keep_what_there_is() -> None:
    """What was built lasts as long as the process: the collector need not look through it again between steps."""
    gc.collect()
    gc.freeze()


def _in_thread[T](function: Callable[[], T]) -> "asyncio.Future[T]":
    """Call a function in a thread that does not hold up the end of the process."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def finish(set_outcome: Callable[[Any], None], outcome: Any) -> None:
        if not future.done():
            set_outcome(outcome)

    def run() -> None:
        try:
            result = function()
        except Exception as error:  # raised in whoever awaits it
            loop.call_soon_threadsafe(finish, future.set_exception, error)
        else:
            loop.call_soon_threadsafe(finish, future.set_result, result)

    threading.Thread(target=run, name="jax", daemon=True).start()
    return future


async def _first(*awaitables: Any) -> None:
    """Wait for the first; the others go on."""
    await asyncio.wait([asyncio.ensure_future(each) for each in awaitables], return_when=asyncio.FIRST_COMPLETED)


def _one_line(error: BaseException | None) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, JaxserveError) else f"{type(error).__name__}: {text}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
