"""Router: which of the engine replicas answers a request."""

import asyncio
from collections.abc import Sequence

from jaxserve.errors import EngineUnavailable, JaxserveError
from jaxserve.request import EngineInfo, Request
from jaxserve.rpc.client import EngineClient, Generation


class Router:
    """Spreads requests over replicas: to the available one with the fewest samples in flight from here.

    Args:
        clients: one a replica.
    """

    def __init__(self, clients: Sequence[EngineClient]):
        self.clients = tuple(clients)

    @property
    def available(self) -> bool:
        """Whether any replica can be asked now."""
        return any(client.available for client in self.clients)

    @property
    def info(self) -> EngineInfo:
        """What the replicas have in common.

        Raises:
            EngineUnavailable: none was reached yet.
        """
        for client in self.clients:
            if client.info is not None:
                return client.info
        raise EngineUnavailable("the model is still loading")

    def submit(self, request: Request) -> Generation:
        """Send a validated request to a replica.

        Raises:
            EngineUnavailable: there is none.
        """
        available = [client for client in self.clients if client.available]
        if not available:
            raise EngineUnavailable
        return min(available, key=lambda client: client.num_in_flight).submit(request)

    def fail_all(self, error: JaxserveError) -> None:
        """Let everything that is in flight from here fail."""
        for client in self.clients:
            client.fail_all(error)

    def start(self) -> None:
        """Connect to all replicas in the background."""
        for client in self.clients:
            client.start()

    async def close(self) -> None:
        """Hang up."""
        await asyncio.gather(*(client.close() for client in self.clients))
