"""Routing by what a real engine says it has cached: two http processes' routers, over real streams, and a double as the other replica."""

import asyncio
from collections.abc import Callable
from pathlib import Path

from engine_double import EngineDouble
from engines import greedy, tiny_runner

from jaxserve.engine import AsyncEngine
from jaxserve.request import Request
from jaxserve.rpc.client import EngineClient
from jaxserve.rpc.router import Router
from jaxserve.rpc.server import EngineServer

PROMPT = [5] * 70  # 4 full pages
REAL = 0  # the replica that holds pages


class Front:
    """What an http process has of routing."""

    def __init__(self, folder: Path):
        self.router = Router([EngineClient(folder / f"{replica}.sock", replica) for replica in range(2)])
        self._num_asked = 0

    @property
    def real(self) -> EngineClient:
        return self.router.clients[REAL]

    async def connect(self) -> None:
        self.router.start()
        await until(lambda: all(client.available for client in self.router.clients))

    async def ask(self, prompt: list[int], replica: int | None = None, max_tokens: int = 2) -> tuple[int, list[int]]:
        """Send a request to a replica, or where the router wants it; returns where it went, and prompt and answer."""
        self._num_asked += 1
        request = Request(f"{id(self)}-{self._num_asked}", tuple(prompt), greedy(max_tokens))
        generation = self.router.submit(request) if replica is None else self.router.clients[replica].submit(request)
        (place,) = (client.replica for client in self.router.clients if generation in client._samples.values())
        tokens = [*prompt]
        while outputs := await generation.read():
            tokens += [token for output in outputs for token in output.token_ids]
        return place, tokens

    def match(self, tokens: list[int]) -> int:
        """Pages that the real engine holds, as far as is known here."""
        return self.real.prefixes.match(self.router._pages(Request("r", tuple(tokens), greedy(1)), self.real.info))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


def test_requests_go_where_their_prefix_is_whoever_sent_it(tmp_path: Path, tiny_checkpoint: Callable[[str], Path]):
    runner = tiny_runner(tiny_checkpoint("llama"))

    async def run() -> None:
        engine, double = AsyncEngine(runner.engine(kv_tokens=240), 9), EngineDouble("")
        servers = [EngineServer(each, tmp_path / f"{replica}.sock") for replica, each in enumerate((engine, double))]
        for server in servers:
            await server.start()
        one, other, late = fronts = [Front(tmp_path) for _ in range(3)]
        await one.connect()
        await other.connect()

        # Answers count too: the next turn of a conversation finds more than the last prompt.
        place, turn = await one.ask(PROMPT, max_tokens=30)
        assert place == REAL and one.match(PROMPT) == 4
        await until(lambda: one.match(turn) == 6)
        # Another http process's prompt.
        await until(lambda: other.match(turn) == 6)
        assert [(await other.ask([n]))[0] for n in (1, 2, 3)] == [REAL, 1, REAL]
        assert [(await other.ask([*turn, 1]))[0] for _ in range(2)] == [REAL, REAL]
        # A new http process is told what there is.
        await late.connect()
        await until(lambda: late.match(turn) == 6)

        # What is evicted draws nobody.
        for n in range(6, 9):
            await one.ask([n] * 200, REAL)
        assert one.match(PROMPT) == 0 and one.match([8] * 200) == 12
        await until(lambda: other.match(PROMPT) == 0)
        assert len({(await other.ask(PROMPT[:n]))[0] for n in (1, 70)}) == 2
        assert all(len(front.real.prefixes) <= 15 for front in fronts)

        # Nothing is left of an engine that ended; one that comes back tells what it has.
        await servers[REAL].stop(0)
        await until(lambda: not any(len(front.real.prefixes) for front in fronts))
        engine.close()
        engine = AsyncEngine(runner.engine(kv_tokens=240), 9)
        again = EngineServer(engine, tmp_path / f"{REAL}.sock")
        await again.start()
        await until(lambda: all(front.real.available for front in fronts))
        assert not any(len(front.real.prefixes) for front in fronts)
        _, turn = await late.ask(PROMPT, REAL)
        await until(lambda: one.match(turn) == other.match(turn) == 4)

        for front in fronts:
            await front.router.close()
        await again.stop(1.0)
        await servers[1].stop(1.0)
        for each in (engine, double):
            each.close()

    asyncio.run(run())


def test_one_replica_is_asked_for_no_pages(tmp_path: Path, tiny_checkpoint: Callable[[str], Path]):
    async def run() -> None:
        engine = AsyncEngine(tiny_runner(tiny_checkpoint("llama")).engine(), 9)
        server = EngineServer(engine, tmp_path / "0.sock")
        await server.start()
        router = Router([EngineClient(tmp_path / "0.sock")])
        router.start()
        await until(lambda: router.available)
        generation = router.submit(Request("r", tuple(PROMPT), greedy(3)))
        while await generation.read():
            pass
        assert len(router.clients[0].prefixes) == 0
        assert all(pool.changes is None for pool in engine._engine.page_watchers._pools)
        await router.close()
        await server.stop(1.0)
        engine.close()

    asyncio.run(run())
