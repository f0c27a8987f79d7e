"""Several hosts: who they are, that they agree, and the stream between leader and workers; no JAX and no processes."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from free_ports import free_port

from jaxserve.config import EngineOptions, HostOptions, ModelOptions
from jaxserve.errors import HostsFailed, StartupError
from jaxserve.hosts.addresses import resolve
from jaxserve.hosts.agreement import agree
from jaxserve.hosts.discovery import discover
from jaxserve.hosts.front import Front
from jaxserve.hosts.leader import Leader
from jaxserve.hosts.member import Member
from jaxserve.hosts.placement import Placement, place
from jaxserve.hosts.secret import proof
from jaxserve.hosts.wire import METHOD
from jaxserve.hosts.worker import Worker
from jaxserve.launcher.fellow_hosts import FellowHosts
from jaxserve.weights import ModelSource
from jaxserve.weights.fingerprint import fingerprint

SECRET = "sixteen characters"
MESH = EngineOptions(mesh="1x4")
LWS = {"LWS_LEADER_ADDRESS": "llm-0.llm", "LWS_GROUP_SIZE": "2", "LWS_WORKER_INDEX": "1"}
SLURM = {
    "SLURM_JOB_ID": "70001",
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_NODES": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "gpu[007-009,12],login",
}


def test_hosts_are_discovered():
    alone = HostOptions(num_hosts=1)
    secret = HostOptions(cluster_secret=SECRET)
    assert discover(HostOptions(), MESH, {}) == alone
    assert discover(HostOptions(), MESH, LWS | {"LWS_GROUP_SIZE": "1"}) == alone
    assert discover(HostOptions(num_hosts=1), MESH, LWS) == alone
    assert discover(secret, MESH, LWS) == HostOptions("llm-0.llm:29400", 2, 1, SECRET)
    assert discover(secret, MESH, SLURM) == HostOptions("gpu007:61442", 4, 3, SECRET)
    assert discover(secret, MESH, SLURM | {"SLURM_STEP_NODELIST": "a,b,c,d"}).coordinator == "a:61442"
    assert discover(secret, MESH, SLURM | {"SLURM_STEP_NODELIST": "r[1-2]n,b,c"}).coordinator == "r1n:61442"
    given = HostOptions("127.0.0.1:5000", 2, 0)
    assert discover(given, MESH, SLURM) == given
    assert discover(HostOptions("10.0.0.1:5000", cluster_secret=SECRET), MESH, LWS) == HostOptions("10.0.0.1:5000", 2, 1, SECRET)


@pytest.mark.parametrize(
    ("options", "mesh", "environment", "told"),
    [
        (HostOptions("127.0.0.1:5000", 2), "1x4", {}, "--num-hosts 2 needs --coordinator and --host-index"),
        (HostOptions("127.0.0.1:5000"), "1x4", {}, "--coordinator and --host-index need --num-hosts"),
        (HostOptions("127.0.0.1:5000", 2, 2), "1x4", {}, r"--host-index must be less than --num-hosts \(2\). Given: 2"),
        (HostOptions("127.0.0.1", 2, 0), "1x4", {}, "--coordinator must be HOST:PORT, with a port from 1 to 65534. Given: 127.0.0.1"),
        (HostOptions("127.0.0.1:65535", 2, 0), "1x4", {}, "--coordinator must be HOST:PORT"),
        (HostOptions("0.0.0.0:5000", 2, 0, SECRET), "1x4", {}, "an address that the other hosts can reach"),
        (HostOptions("10.0.0.1:5000", 2, 0), "1x4", {}, r"need --cluster-secret \(or the variable CLUSTER_SECRET\)$"),
        (HostOptions("10.0.0.1:5000", 2, 0, "short"), "1x4", {}, "--cluster-secret must have at least 16 characters. Given: 5"),
        (HostOptions("127.0.0.1:5000", 3, 0), "1x4", {}, "--mesh 1x4: 3 hosts cannot share 4 devices evenly"),
        (HostOptions("127.0.0.1:5000", 2, 0), "3x1", {}, "--mesh 3x1: 2 hosts cannot share 3 replicas evenly, nor 3 replicas 2 hosts"),
        (HostOptions("127.0.0.1:5000", 4, 0), "2x1", {}, "--mesh 2x1: 2 hosts cannot share 1 devices evenly"),
        (HostOptions(), "1x4", LWS, "LeaderWorkerSet says that there are other hosts, --num-hosts 1 serves without them"),
        (HostOptions(), "1x4", SLURM | {"SLURM_STEP_NUM_TASKS": "8"}, "this Slurm step has 8 tasks on 4 nodes"),
    ],
)
def test_hosts_that_cannot_be(options: HostOptions, mesh: str, environment: dict[str, str], told: str):
    with pytest.raises(StartupError, match=told):
        discover(options, EngineOptions(mesh=mesh), environment)


@pytest.mark.parametrize(
    ("coordinator", "told"),
    [("0:5000", "must be an address that the other hosts can reach. Given: 0:5000"), ("a..b:5000", "a..b:5000: this is no host's name")],
)
def test_coordinators_that_lead_nowhere(coordinator: str, told: str):
    with pytest.raises(StartupError, match=told):
        asyncio.run(resolve(coordinator))


def test_a_secret_may_be_any_bytes():
    assert proof(os.fsdecode(b"\xff" * 16), 0, 1, b"a", b"b") != proof(os.fsdecode(b"\xfe" * 16), 0, 1, b"a", b"b")


class Gathered:
    """Hosts that have all told their part."""

    def __init__(self, *others: str):
        self._others = others

    def gather(self, topic: str, text: str) -> list[str]:
        return [text, *self._others]


def test_hosts_that_disagree():
    agree(Gathered('{"--dtype": "auto", "--sync": false}'), "flags", {"--dtype": "auto", "--sync": False})
    with pytest.raises(StartupError, match=r"^the hosts disagree on --sync: false on host 0, true on host 2$"):
        agree(Gathered('{"--sync": false}', '{"--sync": true}'), "flags", {"--sync": False})
    with pytest.raises(StartupError, match=r"^the hosts disagree on --revision: nothing on host 0, v2 on host 1$"):
        agree(Gathered('{"--revision": "v2"}'), "flags", {"--revision": None})


def test_another_model_has_another_fingerprint(tiny_checkpoint: Callable[[str], Path], tmp_path: Path):
    source = ModelSource("tiny", "", tiny_checkpoint("llama"))
    copy = ModelSource("tiny", "", tmp_path)
    for path in source.path.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert fingerprint(copy) == fingerprint(source)
    weights = bytearray((tmp_path / "model.safetensors").read_bytes())
    weights[len(weights) // 2] ^= 1
    (tmp_path / "model.safetensors").write_bytes(weights)
    assert fingerprint(copy) != fingerprint(source)
    assert fingerprint(copy, with_weights=False) == fingerprint(source, with_weights=False)
    (tmp_path / "config.json").write_text("{}")
    assert fingerprint(copy, with_weights=False) != fingerprint(source, with_weights=False)


class Hosts:
    """A leader, and workers that have joined it."""

    def __init__(self, count: int):
        self.count = count
        self.port = free_port()
        self.leader = Leader("127.0.0.1", self.port, count, SECRET)
        self.workers: dict[int, Worker] = {}
        self.listening: dict[int, asyncio.Task[None]] = {}

    def worker(self, index: int, count: int | None = None, secret: str | None = SECRET) -> Worker:
        return Worker("127.0.0.1", self.port, index, count or self.count, secret)

    async def join(self, index: int) -> Worker:
        self.workers[index] = self.worker(index)
        await self.workers[index].join()
        self.listening[index] = asyncio.create_task(self.workers[index].listen())
        return self.workers[index]

    async def everywhere(self, call: Callable[[Any], Any]) -> list[Any]:
        """Call on all hosts, each in a thread of its own, and wait for all."""
        return await asyncio.gather(*(asyncio.to_thread(call, host) for host in (self.leader, *self.workers.values())))


@asynccontextmanager
async def hosts_of(count: int) -> AsyncIterator[Hosts]:
    hosts = Hosts(count)
    await hosts.leader.start()
    try:
        yield hosts
    finally:
        await hosts.leader.end()
        await asyncio.gather(*hosts.listening.values(), return_exceptions=True)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


def test_what_hosts_tell_each_other(tmp_path: Path):
    async def run() -> None:
        async with hosts_of(3) as hosts:
            await asyncio.gather(hosts.join(1), hosts.join(2))
            await asyncio.to_thread(hosts.leader.wait_for_all)
            for topic in ("a", "b"):
                told = await hosts.everywhere(lambda host, topic=topic: host.gather(topic, f"{topic}{host.index}"))
                assert told == [[f"{topic}0", f"{topic}1", f"{topic}2"]] * 3

            # Workers take what they lack, and keep what they have.
            folders = [tmp_path / str(index) for index in range(3)]
            folders[0].mkdir()
            folders[1].mkdir()
            for name in ("x", "y"):
                (folders[0] / name).write_text(f"the leader's {name}")
            (folders[1] / "x").write_text("the same by its name")
            await hosts.everywhere(lambda host: host.share_files("files", folders[host.index]))
            assert {path.name: path.read_text() for path in folders[1].iterdir()} == {"x": "the same by its name", "y": "the leader's y"}
            assert {path.name: path.read_text() for path in folders[2].iterdir()} == {"x": "the leader's x", "y": "the leader's y"}

            packed, masks = np.arange(-3, 3, dtype=np.int32).reshape(2, 3), np.array([[0xFFFFFFFF, 7]], np.uint32)
            hosts.leader.tell("forward", [packed])
            hosts.leader.tell("sample", [masks])
            hosts.leader.tell("sample", [])
            for worker in hosts.workers.values():
                calls = [await asyncio.to_thread(worker.calls.get) for _ in range(3)]
                assert [call[0] for call in calls if call] == ["forward", "sample", "sample"]
                for array, expected in zip([array for call in calls if call for array in call[1]], [packed, masks], strict=True):
                    np.testing.assert_array_equal(array, expected, strict=True)
            workers = list(hosts.workers.values())
        for worker in workers:
            assert worker.dismissed and worker.calls.get() is None

    asyncio.run(run())


def test_strangers_do_not_join(caplog: pytest.LogCaptureFixture):
    """The wrong secret is told by the worker, and does not disturb the leader; nor does it teach who asks, nor does what is no message."""

    async def run() -> None:
        async with hosts_of(2) as hosts:
            stranger = hosts.worker(1, secret="another secret of mine")
            with pytest.raises(StartupError, match=r"^host 0 \(127.0.0.1:\d+\) has another --cluster-secret$"):
                await stranger.join()
            # One that does not care for the leader's proof is refused by the leader.
            from jaxserve.hosts import membership as module

            trusting = hosts.worker(1, secret="another secret of mine")
            with pytest.MonkeyPatch.context() as patch, pytest.raises(StartupError, match="has another --cluster-secret"):
                patch.setattr(module, "is_proof", lambda digest, expected: True)
                await trusting.join()
            async with grpc.aio.insecure_channel(f"127.0.0.1:{hosts.port}") as channel:
                call = channel.stream_stream(METHOD)()
                await call.write(b"\xff" * 99)
                assert await call.code() == grpc.StatusCode.UNAUTHENTICATED
            await hosts.join(1)
            await asyncio.to_thread(hosts.leader.wait_for_all)
            # Once all are there, one more is turned away.
            with pytest.raises(StartupError, match="there are two hosts with --host-index 1"):
                await hosts.worker(1).join()
            assert hosts.leader.failure is None

    asyncio.run(run())
    assert "DecodeError" not in caplog.text and caplog.text.count("did not show that it knows the cluster secret") == 3


def test_a_host_is_not_ready_before_host_0_has_let_it_in(tmp_path: Path):
    async def run() -> None:
        mesh, hosts = EngineOptions(mesh="2x1"), HostOptions(f"127.0.0.1:{free_port()}", 2, 1, SECRET)
        fellows = FellowHosts(tmp_path, ModelOptions("m"), mesh, hosts)
        staying, joining = asyncio.create_task(fellows.stay()), asyncio.create_task(fellows.join())
        await fellows.placed.wait()
        await asyncio.sleep(0)
        assert not joining.done()
        front = Front("127.0.0.1", int((hosts.coordinator or "").split(":")[1]), mesh, hosts, {}, lambda replica, address: None)
        await front.open()
        await joining
        await front.close()
        assert await staying == ""

    asyncio.run(run())


def test_hosts_that_were_started_otherwise():
    async def run() -> None:
        async with hosts_of(2) as hosts:
            told = "the hosts disagree on --num-hosts: 2 on host 0, 3 on host 1"
            with pytest.raises(StartupError, match=told):
                await hosts.worker(1, count=3).join()
            with pytest.raises(HostsFailed, match=told):
                await asyncio.to_thread(hosts.leader.wait_for_all)
        async with hosts_of(2) as hosts:
            older = hosts.worker(1)
            older._membership._version = "0.0.1"
            with pytest.raises(StartupError, match=r"the hosts disagree on jaxserve's version: .* on host 0, 0\.0\.1 on host 1"):
                await older.join()

    asyncio.run(run())


def test_a_lost_host_is_known_to_all():
    async def run() -> None:
        async with hosts_of(3) as hosts:
            await asyncio.gather(hosts.join(1), hosts.join(2))
            waiting = asyncio.create_task(asyncio.to_thread(hosts.leader.gather, "never", ""))
            await asyncio.sleep(0)
            await hosts.workers[1]._membership._channel.close()
            with pytest.raises(HostsFailed, match=r"^host 1 was lost \(ipv4:127.0.0.1:\d+\)$"):
                await waiting
            assert hosts.leader.why_failed() == hosts.leader.failure
            await hosts.leader.end(hosts.leader.failure or "")
            await hosts.listening[2]
            assert hosts.workers[2].failure == hosts.leader.failure and not hosts.workers[2].dismissed
            with pytest.raises(HostsFailed, match="host 1 was lost"):
                await asyncio.to_thread(hosts.workers[2].gather, "after it", "")

    asyncio.run(run())


def test_a_host_that_is_silent_is_lost():
    """Its connection stays open, and only pings tell."""
    program = (
        "import asyncio, sys\n"
        "from jaxserve.hosts.worker import Worker\n"
        "async def run():\n"
        "    worker = Worker('127.0.0.1', int(sys.argv[1]), 1, 2, sys.argv[2])\n"
        "    await worker.join()\n"
        "    await worker.listen()\n"
        "asyncio.run(run())\n"
    )

    async def run() -> None:
        async with hosts_of(2) as hosts:
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
            with subprocess.Popen([sys.executable, "-c", program, str(hosts.port), SECRET], env=environment) as process:
                try:
                    await asyncio.to_thread(hosts.leader.wait_for_all)
                    process.send_signal(signal.SIGSTOP)
                    await until(lambda: hosts.leader.failure is not None)
                finally:
                    process.kill()
            assert (hosts.leader.failure or "").startswith("host 1 was lost (")

    asyncio.run(run())


def test_a_host_that_cannot_go_on_says_why():
    async def run() -> None:
        async with hosts_of(2) as hosts:
            worker = await hosts.join(1)
            await worker.fail("its disk is full")
            await until(lambda: hosts.leader.failure is not None)
            assert hosts.leader.failure == "host 1: its disk is full"

    asyncio.run(run())


def test_a_port_that_is_taken_is_one_line():
    async def run() -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            leader = Leader("127.0.0.1", taken.getsockname()[1], 2, SECRET)
            with pytest.raises(StartupError, match=r"^cannot listen on 127.0.0.1:\d+: --coordinator must be an address of host 0"):
                await leader.start()

    asyncio.run(run())


def test_where_replicas_lie():
    def placed(mesh: str, count: int) -> list[Placement]:
        return [place(EngineOptions(mesh=mesh), HostOptions(num_hosts=count, host_index=index)) for index in range(count)]

    assert placed("4x2", 1) == [Placement(range(4), 1, 0)]
    assert placed("4x2", 2) == [Placement(range(0, 2), 1, 0), Placement(range(2, 4), 1, 0)]
    assert placed("2x4", 4) == [Placement(range(i // 2, i // 2 + 1), 2, i % 2) for i in range(4)]
    assert placed("1x4", 2) == [Placement(range(1), 2, 0), Placement(range(1), 2, 1)]


class Fellows:
    """A Front of `--mesh 2x2` over four hosts, and members that have joined it."""

    def __init__(self) -> None:
        self.port = free_port()
        self.addresses: dict[int, str] = {}
        hosts = HostOptions("", 4, 0, SECRET)
        self.front = Front("127.0.0.1", self.port, EngineOptions(mesh="2x2"), hosts, {"--dtype": "auto"}, self.addresses.__setitem__)
        self.stays: dict[int, asyncio.Task[str]] = {}

    def join(self, index: int, **facts: object) -> Member:
        member = Member("127.0.0.1", self.port, index, 4, SECRET, {"--dtype": "auto", **facts})
        self.stays[index] = asyncio.create_task(member.stay())
        return member


def test_hosts_of_a_replica_find_each_other_and_come_back(caplog: pytest.LogCaptureFixture):
    async def run() -> None:
        fellows = Fellows()
        await fellows.front.open()
        worker, leader, first = (fellows.join(index) for index in (3, 2, 1))
        fellows.front.tell_coordinator("10.0.0.1:1")
        leader.tell_coordinator("10.0.0.3:3")
        assert await asyncio.gather(worker.coordinator, first.coordinator) == ["10.0.0.3:3", "10.0.0.1:1"]
        leader.tell_engine(1, "10.0.0.3:4")
        fellows.front.tell_ready(0)
        await until(lambda: fellows.front.serves)
        assert fellows.addresses == {1: "10.0.0.3:4"}

        # The leader ends and comes back, faster than its worker has found out.
        await leader.close()
        assert await fellows.stays[2] == ""
        await until(lambda: fellows.addresses == {1: ""} and not fellows.front.serves)
        fellows.join(2).tell_coordinator("10.0.0.3:5")
        assert await fellows.stays[3] == "the first host of this one's replica has begun anew"
        assert await fellows.join(3).coordinator == "10.0.0.3:5"

        # All replicas have been there: who was started otherwise is turned away alone.
        await worker.close()
        await first.close("it has no memory left")
        await fellows.stays[1]
        fellows.join(1, **{"--dtype": "float32"})
        assert await fellows.stays[1] == "the hosts disagree on --dtype: auto on host 0, float32 on host 1"
        assert not fellows.front.failed.is_set()
        await until(lambda: 1 in fellows.front._gate.missing)
        await fellows.front.close()
        assert [await fellows.stays[2], await fellows.stays[3]] == ["", ""]

    asyncio.run(run())
    serves_no_more = [each.message for each in caplog.records if "host 1 serves no more" in each.message]
    assert serves_no_more == ["host 1 serves no more until it is started again: it has no memory left"]


def test_hosts_whose_model_files_differ_all_end():
    async def run() -> None:
        fellows = Fellows()
        await fellows.front.open()
        fellows.join(1).tell_facts({"the model's files": "b"})
        await asyncio.sleep(0.1)
        fellows.front.tell_facts({"the model's files": "a"})
        told = "the hosts disagree on the model's files: a on host 0, b on host 1"
        await until(fellows.front.failed.is_set)
        await fellows.front.close(fellows.front.failure)
        assert [fellows.front.failure, await fellows.stays[1]] == [told, told]

    asyncio.run(run())
