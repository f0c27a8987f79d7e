"""Group: what a leader and a worker have in common: topics that wait until all hosts have told theirs, and the first failure of all."""

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import Future

from jaxserve.errors import HostsFailed
from jaxserve.hosts.addresses import join_address
from jaxserve.hosts.wire import LOSS_TIME


class Group:
    """The hosts of one mesh, as one of them sees them.

    The event loop's thread hears the others; any thread may wait for what it hears.

    Args:
        index: this host's.
        count: of hosts.
        address, port: an IP address of host 0 and where it listens.

    Attributes:
        jax_coordinator: "ADDRESS:PORT" of host 0, where JAX's coordinator listens.
        failure: why the hosts cannot go on together, one line; None while they can.
        failed: set with it.
    """

    def __init__(self, index: int, count: int, address: str, port: int):
        self.index = index
        self.count = count
        self.jax_coordinator = join_address(address, port + 1)
        self.failure: str | None = None
        self.failed = asyncio.Event()
        self._why: Future[str] = Future()
        self._gathered: dict[str, Future[list[str]]] = {}
        self._loop = asyncio.get_running_loop()

    def gather(self, topic: str, text: str) -> list[str]:
        """Tell something on a topic and wait until all hosts have; each topic is for one time (any thread but the event loop's).

        Returns:
            what each host told, by its index.

        Raises:
            HostsFailed: a host is lost or cannot go on.
        """

        def tell() -> Future[list[str]]:
            future = self._topic(topic)
            if self.failure is None:
                self._tell(topic, text)
            return future

        return self._in_loop(tell).result()

    def why_failed(self) -> str | None:
        """Why the hosts cannot go on together; None if nothing of the kind turns out before long (any thread but the event loop's).

        Where a host is lost its peers' collectives fail too, and say less.
        """
        with contextlib.suppress(TimeoutError):
            return self._why.result(LOSS_TIME)
        return None

    def _tell(self, topic: str, text: str) -> None:
        raise NotImplementedError

    def _topic(self, topic: str) -> Future[list[str]]:
        """What will be known of a topic (event loop)."""
        future = self._gathered.setdefault(topic, Future())
        if self.failure is not None and not future.done():
            future.set_exception(HostsFailed(self.failure))
        return future

    def _in_loop[T](self, function: Callable[[], T]) -> T:
        """Call a function in the event loop's thread and wait for it."""
        done: Future[T] = Future()

        def call() -> None:
            try:
                done.set_result(function())
            except Exception as error:  # raised in the thread that asked
                done.set_exception(error)

        self._loop.call_soon_threadsafe(call)
        return done.result()

    def _fail(self, reason: str) -> bool:
        """Let everybody who waits know that the hosts cannot go on; the first reason counts (event loop).

        Returns:
            whether it is the first.
        """
        if self.failure is not None:
            return False
        self.failure = reason
        self.failed.set()
        self._why.set_result(reason)
        for future in self._gathered.values():
            if not future.done():
                future.set_exception(HostsFailed(reason))
        return True
