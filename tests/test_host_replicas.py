"""Replicas on several hosts behind host 0's port: launchers on loopback, with engine doubles, and with the tiny model."""

import asyncio
import json
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from engines import greedy, load_goldens
from few_programs import Precompiled
from free_ports import free_port
from test_launcher import ENDLESS, Server
from test_two_hosts import ONE_SLOT, Launchers, tokens_by_sample

from jaxserve.client import Client, ServerError, connect
from jaxserve.request import Request

SECRET = "sixteen characters"
LOSS_TIME = 20.0  # seconds


class Cluster:
    """Launchers of several hosts with engine doubles; any may be started again."""

    def __init__(self, folder: Path, mesh: str, num_hosts: int):
        self.servers: dict[int, Server] = {}
        self._folder = folder
        self._mesh = mesh
        self._hosts = {"coordinator": f"127.0.0.1:{free_port()}", "num_hosts": num_hosts, "cluster_secret": SECRET}
        self._all: list[Server] = []

    def start(self, index: int, hosts: dict[str, Any] | None = None, engine: dict[str, Any] | None = None) -> Server:
        (folder := self._folder / str(len(self._all))).mkdir()
        sections = {"hosts": {**self._hosts, "host_index": index, **(hosts or {})}, "engine": {"mesh": self._mesh, **(engine or {})}}
        self.servers[index] = Server(folder, ENDLESS, **sections)
        self._all.append(self.servers[index])
        return self.servers[index]

    def close(self) -> None:
        for server in self._all:
            server.close()


@pytest.fixture
def cluster() -> Iterator[Callable[[str, int], Cluster]]:
    made: list[Cluster] = []
    with tempfile.TemporaryDirectory(prefix="js", dir="/tmp") as folder:

        def make(mesh: str, num_hosts: int) -> Cluster:
            (own := Path(folder) / str(len(made))).mkdir()
            made.append(Cluster(own, mesh, num_hosts))
            return made[-1]

        yield make
        for each in made:
            each.close()


@pytest.fixture
def real_hosts(tiny_checkpoint: Callable[[str], Path]) -> Iterator[Callable[..., Launchers]]:
    """Starts launchers with engines of the tiny model; those that are left at the end are killed."""
    with tempfile.TemporaryDirectory(prefix="js", dir="/tmp") as folder:
        made: list[Launchers] = []

        def start(mesh: str, num_hosts: int, cache: Path) -> Launchers:
            made.append(Launchers(tiny_checkpoint("llama"), Path(folder), cache, *ONE_SLOT, mesh=mesh, each=[[]] * num_hosts))
            return made[-1]

        yield start
        for each in made:
            each.close()


def last_line(server: Server, code: int = 1, timeout: float = LOSS_TIME) -> str:
    """What a launcher says last, once it has ended with this exit code."""
    assert server.process.wait(timeout) == code, server.log()
    assert "Traceback" not in server.log(), server.log()
    return server.log().strip().splitlines()[-1]


def both_give_the_tokens_of_one(hosts: Launchers) -> None:
    """Two replicas, each of which computes some of the goldens."""
    hosts.until(lambda: hosts.metric("jaxserve_engine_up") == [1, 1])
    prompts, tokens = load_goldens("llama")
    given = hosts.answers([Request(f"{i}", tuple(prompts[i]), greedy(len(tokens[i]))) for i in range(8)])
    assert tokens_by_sample(given) == {(f"{i}", 0): tokens[i] for i in range(8)}
    hosts.until(lambda: min(hosts.metric("vllm:generation_tokens_total")) > 0)


def up(server: Server) -> list[float]:
    return server.metric("jaxserve_engine_up")


def test_replicas_of_two_hosts(cluster: Callable[[str, int], Cluster]):
    hosts = cluster("2x1", 2)
    front, stranger = hosts.start(0), hosts.start(1, hosts={"cluster_secret": "another secret of mine"})
    assert last_line(stranger).endswith("has another --cluster-secret")
    front.until_ready()
    second = hosts.start(1)
    front.until(lambda: up(front) == [1, 1])

    # kill -9 of the other host's engine: host 0's stream goes on, and the engine comes back, at another port.
    streams = [front.stream(), front.stream()]
    assert all(next(stream).startswith("data: {") for stream in streams)
    front.until(lambda: front.metric("jaxserve_requests_running") == [1, 1])
    second.engine().kill()
    *_, error, done = streams[1]
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "engine_unavailable" and done == "data: [DONE]"
    front.until(lambda: up(front) == [1, 1])
    assert front.metric("jaxserve_engine_losses_total") == [0, 1]
    assert all("error" not in next(streams[0]) for _ in range(5))

    # kill -9 of its launcher. One that was started otherwise is turned away; the right one is taken back.
    second.process.kill()
    front.until(lambda: up(front) == [1, 0])
    assert all("error" not in next(streams[0]) for _ in range(5))
    other = hosts.start(1, engine={"page_size": 32})
    assert last_line(other) == "jaxserve: error: the hosts disagree on --page-size: 16 on host 0, 32 on host 1"
    second = hosts.start(1)
    front.until(lambda: up(front) == [1, 1])

    # SIGTERM to it alone: what it has begun it finishes, and new requests go to host 0.
    finite = front.stream(max_tokens=100)
    assert next(finite).startswith("data: {")
    front.until(lambda: front.metric("jaxserve_requests_running") == [1, 1])
    second.process.send_signal(signal.SIGTERM)
    second.until(lambda: "ending: " in second.log())
    for _ in range(3):
        assert front.client.post("/v1/completions", json={"prompt": "abc", "max_tokens": 2}).status_code == 200
    *_, last, done = finite
    assert json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"] == "length" and done == "data: [DONE]"
    last_line(second, code=0)
    assert all("error" not in next(streams[0]) for _ in range(5))

    # The end of host 0 is the end of all.
    second = hosts.start(1)
    front.until(lambda: up(front) == [1, 1])
    front.process.kill()
    assert last_line(second).startswith("jaxserve: error: host 0 was lost (127.0.0.1:")


def test_hosts_that_were_started_otherwise_and_hosts_that_are_told_to_end(cluster: Callable[[str, int], Cluster]):
    hosts = cluster("4x1", 2)
    front, other = hosts.start(0), hosts.start(1, engine={"sync": True})
    told = "jaxserve: error: the hosts disagree on --sync: false on host 0, true on host 1"
    assert [last_line(front), last_line(other)] == [told, told]

    front, second = hosts.start(0), hosts.start(1)
    front.until_ready().until(lambda: up(front) == [1, 1, 1, 1])
    stream = front.stream(max_tokens=50)
    assert next(stream).startswith("data: {")
    for server in (second, front):
        server.process.send_signal(signal.SIGTERM)
    *_, last, done = stream
    assert json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"] == "length" and done == "data: [DONE]"
    for server in (front, second):
        last_line(server, code=0)
        assert "ERROR" not in server.log() and "WARNING" not in server.log(), server.log()


def test_replicas_that_span_hosts_give_the_tokens_of_one(real_hosts: Callable[..., Launchers], tmp_path: Path):
    """Four hosts, of which each two share a replica. Where one is lost, its replica is taken out, and the other loses nothing."""
    hosts = real_hosts("2x2", 4, tmp_path).until_ready()
    both_give_the_tokens_of_one(hosts)

    streams = [hosts.stream(), hosts.stream()]
    assert all(next(stream).startswith("data: {") for stream in streams)
    hosts.jax_process(2).kill()
    whose = "replica 1, of hosts 2 to 3, here counted from 0: "
    assert hosts.last_line(2, 1, LOSS_TIME) == f"jaxserve: error: {whose}engine 1 was killed by SIGKILL"
    told = hosts.last_line(3, 1, LOSS_TIME)
    # JAX ends a process whose coordinator is gone: on a busy machine before it has read that the stream to host 0 broke.
    by_jax = f"{whose}worker was killed by SIGABRT; JAX does that where another host is lost"
    assert told.startswith(f"jaxserve: error: {whose}host 0 was lost (127.0.0.1:") or told == f"jaxserve: error: {by_jax}"
    errors = ["error" in json.loads(list(stream)[-2].removeprefix("data: ")) for stream in streams]
    assert errors == [False, True]

    # Host 0 ends with its replica.
    hosts.jax_process(1).kill()
    whose = "replica 0, of hosts 0 to 1, here counted from 0: "
    assert hosts.last_line(0, 1, LOSS_TIME).startswith(f"jaxserve: error: {whose}host 1 was lost (")


class Streamed:
    """A greedy answer as its stream brings it.

    Attributes:
        tokens: so far.
        begun: set with the first, or where there will be none.
        error: of a stream that ended with one.
    """

    def __init__(self, prompt: list[int], max_tokens: int):
        self.tokens: list[int] = []
        self.begun = asyncio.Event()
        self.error = ""
        self._body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        self._body |= {"logprobs": 0, "return_tokens_as_token_ids": True}

    async def read(self, client: Client) -> None:
        """Ask, and read to the end."""
        try:
            async for event in client.stream("/v1/completions", self._body):
                for choice in event["choices"]:
                    self.tokens += [int(name.removeprefix("token_id:")) for name in choice["logprobs"]["tokens"]]
                self.begun.set()
        except ServerError as error:
            self.error = str(error)
            self.begun.set()


async def begin_and_suspend(client: Client, engine: psutil.Process, prompts: list[list[int]]) -> tuple[list[Streamed], list[asyncio.Task]]:
    """Suspend an engine in the middle of its answer. As quick as the model is, that may be over before: then once more."""
    for _ in range(20):
        answers = [Streamed(prompt, 200) for prompt in prompts]  # one a replica
        reads = [asyncio.create_task(each.read(client)) for each in answers]
        for each in answers:
            await each.begun.wait()
        engine.suspend()
        await asyncio.wait(reads, return_when=asyncio.FIRST_COMPLETED)  # the other replica's, at the latest
        _, unfinished = await asyncio.wait(reads, timeout=0.3)
        if unfinished:
            return answers, reads
        engine.resume()
    raise AssertionError("no answer lasted until its engine was suspended")


async def lose_a_replica_under_load(hosts: Launchers) -> None:
    """kill -9 of the second engine: what it had begun fails with what it had told, everybody else gets each token once."""
    prompts, tokens = load_goldens("llama")
    async with connect(f"http://127.0.0.1:{hosts.port}") as client:
        engine = hosts.jax_process(1)
        longest, reads = await begin_and_suspend(client, engine, [prompts[i] for i in (9, 10)])
        rest = [i for i in range(len(prompts)) if i not in (9, 10)]
        others = {i: Streamed(prompts[i], len(tokens[i])) for i in rest}
        reads += [asyncio.create_task(each.read(client)) for each in others.values()]
        await asyncio.wait([asyncio.create_task(each.begun.wait()) for each in others.values()], return_when=asyncio.FIRST_COMPLETED)
        engine.kill()
        await asyncio.gather(*reads)
    assert {i: (each.tokens, each.error) for i, each in others.items()} == {i: (tokens[i], "") for i in others}
    (lost,), (kept,) = ([each for each in longest if bool(each.error) is failed] for failed in (True, False))
    assert lost.error == "the engine process ended while the request ran" and 0 < len(lost.tokens) < 200 == len(kept.tokens)
    for i, each in zip((9, 10), longest, strict=True):
        assert each.tokens[: len(tokens[i])] == tokens[i][: len(each.tokens)]


def test_whole_replicas_of_two_hosts_give_the_tokens_of_one(real_hosts: Callable[..., Launchers], few_programs: Precompiled):
    """And go on doing so where one of them is killed under load, which then comes back."""
    hosts = real_hosts("2x1", 2, few_programs.folder).until_ready()
    both_give_the_tokens_of_one(hosts)
    asyncio.run(lose_a_replica_under_load(hosts))
    both_give_the_tokens_of_one(hosts)
    assert hosts.metric("jaxserve_engine_losses_total") == [0, 1]
