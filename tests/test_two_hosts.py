"""Two hosts on one machine, through the real launcher: JAX's processes, gloo between them, and what becomes of one when the other dies."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import jax
import psutil
import pytest
from engines import finish, greedy, load_goldens, tiny_runner
from free_ports import free_port

from jaxserve.grammar import Grammar
from jaxserve.request import Request, SamplingParams, TokenOutput
from jaxserve.rpc.client import EngineClient
from jaxserve.rpc.handshake import StreamKey
from jaxserve.rpc.router import Router
from jaxserve.runner import Hosts, start_jax

SECRET = "sixteen characters"
# Two ways to have few programs, all of which both hosts compile.
ONE_SHAPE = ("--deterministic",)
ONE_SLOT = "--max-batch-size", "1", "--disable-grammar-support"
LOSS_TIME = 30.0  # seconds
READY_TIME = 180.0  # seconds, of a machine that has other things to do


class Launchers:
    """`jaxserve` on several hosts of this machine, with the devices of a mesh shared between them; each host has more than it takes.

    Args:
        folder: for the run folders and logs; short.
        cache: of compiled programs.
        flags: of all.
        each: flags of each.
    """

    def __init__(self, model: Path, folder: Path, cache: Path, *flags: str, mesh: str = "1x4", each: Sequence[list[str]] = ([], [])):
        self.port, self.coordinator = free_port(), free_port()
        self.processes: list[subprocess.Popen[bytes]] = []
        self._folder = folder
        self._logs = [folder / f"log{index}" for index in range(len(each))]
        common = ["--model-id", model, "--mesh", mesh, "--num-hosts", len(each), "--coordinator", f"127.0.0.1:{self.coordinator}"]
        common += ["--hostname", "127.0.0.1", "--port", self.port, "--max-batch-size", "2", "--max-batch-prefill-tokens", "32"]
        common += ["--max-total-tokens", "240", "--cpu-kv-cache-gib", "0.01", "--compilation-cache-dir", cache, *flags]
        self._command = [sys.executable, "-m", "jaxserve", *map(str, common)]
        self._environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "TMPDIR": str(folder),
            "CLUSTER_SECRET": SECRET,
        }
        for index, own in enumerate(each):
            self._start(index, own)

    def _start(self, index: int, flags: list[str]) -> None:
        command = [*self._command, "--host-index", str(index), *flags]
        with open(self._logs[index], "w") as log:
            self.processes.insert(index, subprocess.Popen(command, env=self._environment, stderr=log, stdout=log))

    def start_again(self, *indices: int) -> None:
        """Hosts that have ended; without flags of their own."""
        for index in indices:
            self.processes.pop(index)
            self._start(index, [])

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + READY_TIME
        while not condition():
            logs = "".join(map(self.log, range(len(self.processes))))
            assert time.monotonic() < deadline and all(process.poll() is None for process in self.processes), logs
            time.sleep(0.05)

    def until_ready(self) -> "Launchers":
        self.until(lambda: all("ready: " in self.log(index) for index in range(len(self.processes))))
        return self

    def log(self, index: int) -> str:
        return self._logs[index].read_text()

    def jax_process(self, index: int) -> psutil.Process:
        """The process of a host that uses JAX; it has one."""
        children = psutil.Process(self.processes[index].pid).children()
        modules = {"jaxserve.launcher.host_process", "jaxserve.launcher.engine_process"}
        return next(child for child in children if modules & set(child.cmdline()))

    def listening(self, port: int) -> list[str]:
        """Addresses at which the hosts' JAX processes listen on a port; gRPC has some as IPv4 in IPv6."""
        processes = map(self.jax_process, range(len(self.processes)))
        sockets = [connection for process in processes for connection in process.net_connections("tcp") if connection.status == "LISTEN"]
        return [socket.laddr.ip.removeprefix("::ffff:") for socket in sockets if socket.laddr.port == port]

    def metric(self, name: str) -> list[float]:
        """Values of a labelled metric."""
        lines = httpx.get(f"http://127.0.0.1:{self.port}/metrics").text.splitlines()
        return [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + "{")]

    def last_line(self, index: int, code: int, timeout: float) -> str:
        """What a launcher says last, once it has ended with this exit code."""
        assert self.processes[index].wait(timeout) == code, self.log(index)
        assert "Traceback" not in self.log(index), self.log(index)
        return self.log(index).strip().splitlines()[-1]

    def answers(self, requests: list[Request]) -> dict[tuple[str, int], list[TokenOutput]]:
        """Outputs of requests that are sent to all engines at once, as host 0's http processes do, by (request id, sample index)."""
        return asyncio.run(self._answers(requests))

    async def _answers(self, requests: list[Request]) -> dict[tuple[str, int], list[TokenOutput]]:
        clients = [EngineClient(next(self._folder.glob("jaxserve-*/engine-0.sock")))]
        for replica, place in enumerate(sorted(self._folder.glob("jaxserve-*/engine-*.address")), 1):
            clients.append(EngineClient(place, replica, StreamKey(SECRET, replica)))
        router = Router(clients)
        router.start()
        while not all(client.available for client in clients):
            await asyncio.sleep(0.01)
        outputs: dict[tuple[str, int], list[TokenOutput]] = {}

        async def read(request: Request) -> None:
            generation = router.submit(request)
            while some := await generation.read():
                for output in some:
                    outputs.setdefault((request.request_id, output.index), []).append(output)

        await asyncio.gather(*map(read, requests))
        await router.close()
        return outputs

    def stream(self) -> Iterator[str]:
        """Events of a long answer over HTTP."""
        body = {"prompt": "abc", "max_tokens": 200, "stream": True, "ignore_eos": True, "temperature": 0}
        with httpx.stream("POST", f"http://127.0.0.1:{self.port}/v1/completions", json=body, timeout=60) as response:
            assert response.status_code == 200
            yield from (line for line in response.iter_lines() if line)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture
def two_hosts(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> Iterator[Callable[..., Launchers]]:
    """Starts pairs of hosts; those that are left at the end are killed."""
    with tempfile.TemporaryDirectory(prefix="js", dir="/tmp") as folder:  # pytest's own are too long for a socket's name
        made: list[Launchers] = []

        def start(*flags: str, **options: Any) -> Launchers:
            (own := Path(folder) / str(len(made))).mkdir()
            made.append(Launchers(tiny_checkpoint("llama"), own, tmp_path, *flags, **options))
            return made[-1]

        yield start
        for each in made:
            each.close()


def some_requests() -> list[Request]:
    """Requests that together need every program: chunks, decodes, masks, page copies, loaded slots, page entries, scores."""
    prompts, tokens = load_goldens("llama")
    requests = [Request(f"golden {i}", tuple(prompts[i]), greedy(len(tokens[i]))) for i in range(12)]
    seeded = dict(temperature=1.0, seed=7, max_tokens=12, ignore_eos=True)
    ways: dict[str, dict[str, Any]] = {
        "sampled": dict(n=2, top_p=0.9),
        "loaded": dict(repetition_penalty=1.3, logit_bias={77: 4.0}),
        "told": dict(logprobs=3),
        "scored": dict(prompt_logprobs=2),
    }
    for name, options in ways.items():
        requests.append(Request(name, tuple(prompts[20]), SamplingParams(**seeded, **options)))
    words = Grammar.regex("[a-z]{3} [a-z]{3}", "regex")
    return [*requests, Request("constrained", (9, 8, 7), SamplingParams(temperature=1.0, seed=3, max_tokens=12, grammar=words))]


def tokens_by_sample(outputs: dict[tuple[str, int], list[TokenOutput]]) -> dict[tuple[str, int], list[int]]:
    return {sample: [token for output in each for token in output.token_ids] for sample, each in outputs.items()}


def test_two_hosts_give_the_tokens_of_one_device_until_one_is_killed(
    two_hosts: Callable[..., Launchers], tiny_checkpoint: Callable[[str], Path]
):
    both = two_hosts(*ONE_SHAPE).until_ready()
    # Ours and JAX's, which asks nobody who he is, are where they were told to be, and not on the machine's other networks.
    assert both.listening(both.coordinator) == both.listening(both.coordinator + 1) == ["127.0.0.1"]
    engine = tiny_runner(tiny_checkpoint("llama")).engine(eos_token_ids=(0,))
    for request in some_requests():
        engine.add_request(request)
    expected, given = finish(engine), both.answers(some_requests())
    assert tokens_by_sample(given) == tokens_by_sample(expected)
    _, tokens = load_goldens("llama")
    assert all(tokens_by_sample(given)[f"golden {i}", 0] == tokens[i] for i in range(12))
    scores = [next(o.prompt_logprobs for o in outputs["scored", 0] if o.prompt_logprobs) for outputs in (given, expected)]
    assert scores[0].raw == pytest.approx(scores[1].raw, abs=1e-4)
    metrics = httpx.get(f"http://127.0.0.1:{both.port}/metrics").text
    assert [line.split()[-1] for line in metrics.splitlines() if line.startswith("jaxserve_compile_events_total")] == ["0.0"]

    stream = both.stream()
    assert next(stream).startswith("data: {")
    both.jax_process(1).kill()
    killed = time.monotonic()
    *_, error, done = stream
    assert done == "data: [DONE]" and "host 1 was lost" in json.loads(error.removeprefix("data: "))["error"]["message"]
    assert both.last_line(0, 1, LOSS_TIME).startswith("jaxserve: error: host 1 was lost (")
    assert both.last_line(1, 1, LOSS_TIME) == "jaxserve: error: worker was killed by SIGKILL"
    assert time.monotonic() - killed < LOSS_TIME


def test_jax_is_told_where_to_listen_and_for_how_long_a_host_may_be_silent(monkeypatch: pytest.MonkeyPatch):
    told: dict[str, Any] = {}
    monkeypatch.setattr(jax.distributed, "initialize", lambda *arguments, **options: told.update(options, where=arguments))
    monkeypatch.setattr(jax.config, "update", lambda *option: None)
    start_jax(cast(Hosts, SimpleNamespace(jax_coordinator="10.1.2.3:29401", count=2, index=1)))
    assert told["where"] == ("10.1.2.3:29401", 2, 1) and told["coordinator_bind_address"] == "10.1.2.3:29401"
    assert 0 < told["heartbeat_timeout_seconds"] <= 10


def test_hosts_that_were_started_otherwise_are_one_line_each_and_the_right_one_may_join_later(two_hosts: Callable[..., Launchers]):
    other = two_hosts(each=(["--dtype", "float32"], ["--dtype", "bfloat16"]))
    stranger = two_hosts(*ONE_SLOT, each=([], ["--cluster-secret", "another secret of mine"]))
    told = "jaxserve: error: the hosts disagree on --dtype: float32 on host 0, bfloat16 on host 1"
    assert [other.last_line(index, 1, READY_TIME) for index in range(2)] == [told, told]
    assert stranger.last_line(1, 1, READY_TIME).endswith("has another --cluster-secret")
    assert stranger.processes[0].poll() is None  # anybody may knock

    # Told to end while it starts, host 0 ends in peace; a worker that is told too waits for it.
    stranger.start_again(1)
    stranger.until(lambda: "host 1 of 2 has joined" in stranger.log(0))
    for process in reversed(stranger.processes):
        process.send_signal(signal.SIGTERM)
    for index in range(2):
        stranger.last_line(index, 0, LOSS_TIME)
