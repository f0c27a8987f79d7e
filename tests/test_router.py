"""Router: which replica gets a request, and where it goes when that replica is lost. The clients are real and talk to nobody."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from jaxserve.errors import EngineUnavailable, InvalidRequest, JaxserveError, Overloaded
from jaxserve.request import EngineInfo, Request, SamplingParams, TokenOutput
from jaxserve.rpc import prefix_index
from jaxserve.rpc import router as router_module
from jaxserve.rpc.client import EngineClient, Generation
from jaxserve.rpc.prefix_index import PrefixIndex
from jaxserve.rpc.router import SLACK, Router


def make_router(count: int = 2) -> Router:
    clients = [EngineClient(Path("nowhere"), replica) for replica in range(count)]
    for client in clients:
        client.available = True
        client.info = EngineInfo("m", "", "", 1000, 10000, 9999, (0,), 16, 500, "3x1", "float32", "cpu", {})
    return Router(clients)


def request(name: str, tokens: Sequence[int], salt: str = "", **params: int) -> Request:
    return Request(name, tuple(tokens), SamplingParams(**params), salt)  # type: ignore[arg-type]


def replica_of(router: Router, generation: Generation) -> int:
    (client,) = (client for client in router.clients if generation in client._samples.values())
    return client.replica


def ask(router: Router, tokens: Sequence[int], salt: str = "", **params: int) -> int:
    """The replica of a request that ends once its prompt is computed, which the replica tells."""
    asked = request("r", tokens, salt, **params)
    generation = router.submit(asked)
    replica = replica_of(router, generation)
    router.clients[replica].prefixes.change(0, pages_of(router, asked), ())
    begin(generation)
    generation.abort()
    return replica


def pages_of(router: Router, asked: Request) -> list[int]:
    return router._pages(asked, router.clients[0].info)


def begin(generation: Generation) -> None:
    generation.take(TokenOutput("", 0, [5], []))


def conversation(number: int, pages: int = 4) -> list[int]:
    return [number] * 16 * pages


def test_a_conversation_stays_where_its_prefix_is():
    router = make_router(3)
    # Replicas equally busy: whichever was sent nothing for longest.
    homes = [ask(router, conversation(n)) for n in range(6)]
    assert sorted(homes) == [0, 0, 1, 1, 2, 2]
    for n, home in enumerate(homes):
        assert ask(router, [*conversation(n), 7, 8, 9]) == home
        assert ask(router, [*conversation(n, 2), *conversation(90 + n, 2)]) == home
    busy = router.submit(request("busy", conversation(50)))
    assert ask(router, conversation(homes.index(replica_of(router, busy)))) == replica_of(router, busy)  # busier, but by one only
    assert ask(router, [1, 2, 3]) != replica_of(router, busy)


def test_who_may_not_share_a_prefix_is_not_drawn_by_it():
    router = make_router()
    for _ in range(3):
        assert ask(router, conversation(1)) == 0
    for _ in range(2):
        assert ask(router, conversation(1), salt="other") == 1
    # Scoring a prompt computes all of it: no use in the cache.
    blocker = router.submit(request("blocker", [5]))
    assert replica_of(router, blocker) == 0
    assert ask(router, conversation(1)) == 0 and ask(router, conversation(1), prompt_logprobs=0) == 1


def test_a_hot_prefix_spreads():
    router = make_router()
    hot = [router.submit(request(f"h{n}", [*conversation(1), n])) for n in range(4 * SLACK)]
    homes = [replica_of(router, generation) for generation in hot]
    most = int(SLACK * 64 / 65)  # one token of 65 is not cached
    assert homes[: most + 1] == [0] * (most + 1) and homes[most + 1] == 1
    assert abs(homes.count(0) - homes.count(1)) <= most + 1
    # Of a prompt of which little is cached hardly any imbalance is taken.
    router = make_router()
    assert ask(router, conversation(1, 1)) == 0
    assert replica_of(router, router.submit(request("busy", conversation(1, 1)))) == 0
    assert ask(router, [*conversation(1, 1), *conversation(2, 30)]) == 1


def test_nothing_is_remembered_of_an_engine_that_ended():
    router = make_router()
    assert [ask(router, conversation(n)) for n in range(2)] == [0, 1]
    router.submit(request("lost with it", conversation(1)))
    router.clients[1]._lose_all()
    assert ask(router, conversation(1)) == 0
    router.clients[1].available = True
    assert (len(router.clients[1].prefixes), router.clients[1].num_losses) == (0, 1)
    assert not router.clients[1]._computing


def test_an_evicted_prefix_draws_nobody():
    router = make_router()
    assert [ask(router, conversation(n)) for n in (0, 1, 0, 0)] == [0, 1, 0, 0]
    pages = pages_of(router, request("r", conversation(0)))
    router.clients[0].prefixes.change(0, (), pages[2:])
    assert ask(router, conversation(0)) == 0  # half of it is still there
    router.clients[0].prefixes.change(0, (), pages)
    assert ask(router, conversation(0)) == 1


def test_a_prompt_counts_while_it_is_computed_and_then_by_what_the_engine_tells():
    router = make_router()
    client, asked = router.clients[0], request("r", conversation(0))
    pages = pages_of(router, asked)
    rejected, aborted, first, second = (router.submit(asked) for _ in range(4))
    assert {replica_of(router, each) for each in (rejected, aborted, first, second)} == {0}
    aborted.abort()
    client._reject(rejected._number, InvalidRequest("no"))
    assert client.prefixes.match(pages) == 4 and len(client.prefixes) == 4
    client.prefixes.change(0, pages[:3], ())
    begin(first)
    assert client.prefixes.match(pages) == 4  # the second one's
    begin(second)
    assert client.prefixes.match(pages) == 3 and len(client.prefixes) == 3
    first.abort()
    assert client.prefixes.match(pages) == 3 and not client._computing


def test_what_is_computed_is_not_guessed_at_where_routing_is_not_by_prefix():
    for router in (make_router(1), make_router()):
        if len(router.clients) > 1:
            router = Router(router.clients, by_prefix=False)
        router.submit(request("r", conversation(0)))
        assert not any(client.routes_by_prefix or len(client.prefixes) for client in router.clients)


def test_a_windowed_engine_needs_only_what_its_next_token_sees():
    index = PrefixIndex(16, (0, 33))  # of 6 pages the last 2 are seen
    index.change(0, range(6), ())
    index.change(1, (4, 5), ())
    assert index.match(range(8)) == 6
    index.change(1, (), (5,))
    assert index.match(range(8)) == 0
    index.change(1, (1, 2), ())
    assert index.match(range(8)) == 3
    index.change(0, (), (1,))
    assert index.match(range(8)) == 0


def test_the_index_is_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prefix_index, "MAX_PAGES_KEPT", 8)
    index = PrefixIndex()
    index.change(0, range(6), ())
    index.change(0, range(6, 12), ())
    assert len(index) == 6
    index.change(0, range(6, 8), range(2))
    assert len(index) == 6 and index.match(range(2, 8)) == 6


def error_of(generation: Generation) -> JaxserveError | None:
    return generation._error


def test_what_had_not_begun_is_sent_elsewhere_once():
    router = make_router(3)
    generations = [router.submit(request(f"r{n}", [n])) for n in range(6)]
    assert [replica_of(router, generation) for generation in generations] == [0, 1, 2, 0, 1, 2]
    begin(generations[0])
    router.clients[0]._lose_all()
    assert isinstance(error_of(generations[0]), EngineUnavailable)
    moved = generations[3]
    assert error_of(moved) is None and replica_of(router, moved) in (1, 2)
    assert [client.num_in_flight for client in router.clients[1:]] in ([3, 2], [2, 3])
    # What may be the reason for a second death does not get to a third engine.
    router.clients[replica_of(router, moved)]._lose_all()
    assert isinstance(error_of(moved), EngineUnavailable)
    assert sum(error_of(generation) is None for generation in generations) == 4
    # The last one.
    next(client for client in router.clients if client.available)._lose_all()
    assert all(isinstance(error_of(generation), EngineUnavailable) for generation in generations)
    with pytest.raises(EngineUnavailable):
        router.submit(request("late", [1]))


def test_a_replica_without_room_passes_it_on(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(router_module, "RETRY_INTERVAL", 0.0)

    def refuse(router: Router, replica: int, generation: Generation) -> None:
        router.clients[replica]._reject(generation._number, Overloaded())

    async def run() -> None:
        router = make_router()
        generation = router.submit(request("r", [1]))
        refuse(router, 0, generation)
        assert replica_of(router, generation) == 1
        refuse(router, 1, generation)
        assert isinstance(error_of(generation), Overloaded)

        # One that was lost had been accepted: it waits for room.
        router = make_router()
        lost, dropped = router.submit(request("lost", [1])), router.submit(request("dropped", [1], n=2))
        router.clients[0]._lose_all()
        for _ in range(3):
            refuse(router, 1, lost)
            assert error_of(lost) is None and router.clients[1].num_in_flight == 2
            await asyncio.sleep(0.01)
            assert replica_of(router, lost) == 1
        refuse(router, 1, lost)
        router.fail_all(EngineUnavailable("the server is ending"))
        assert str(error_of(lost)) == str(error_of(dropped)) == "the server is ending"
        await asyncio.sleep(0.01)
        assert router.clients[1].num_in_flight == 0

    asyncio.run(run())
