"""The launcher with its real processes; the engines are doubles (engine_double.py as a program)."""

import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from live_front_end import LiveFrontEnd
from tiny_models import write_tokenizer

from jaxserve.config import EngineOptions, ModelOptions, ServerOptions
from jaxserve.errors import DeviceError, StartupError
from jaxserve.launcher import launcher as launcher_module
from jaxserve.launcher.child import ChildOptions
from jaxserve.launcher.devices import device_environment
from jaxserve.launcher.listening import listen, num_http_processes
from jaxserve.launcher.run_folder import PREFIX, make_run_folder, remove_abandoned

DOUBLE = str(Path(__file__).parent / "engine_double.py")


class Server:
    """`jaxserve` with engine doubles, in a run folder of its own.

    Args:
        folder: for the run folder and the tokenizer.
        double: arguments of EngineDouble.
        sections: options as JSON, by section.
    """

    def __init__(self, folder: Path, double: dict[str, Any] | None = None, **sections: dict[str, Any]):
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.folder = folder
        write_tokenizer(folder)
        self._log = open(folder / "log", "w+")  # noqa: SIM115 (closed by close)
        sections["server"] = {"hostname": "127.0.0.1", "port": self.port, **sections.get("server", {})}
        self.process = subprocess.Popen(
            [sys.executable, DOUBLE, "serve", json.dumps(sections)],
            env={
                **os.environ,
                "TMPDIR": str(folder),
                "ENGINE_DOUBLE": json.dumps({"model_path": str(folder), "vocab_size": 320, **(double or {})}),
            },
            stderr=self._log,
        )
        self.children: list[psutil.Process] = []
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=20)

    def until(self, condition: Callable[[], Any], timeout: float = 60.0) -> None:
        deadline = time.monotonic() + timeout
        while True:
            with contextlib.suppress(httpx.TransportError, psutil.NoSuchProcess):
                if condition():
                    return
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.02)

    def until_ready(self) -> "Server":
        self.until(lambda: self.client.get("/health").status_code == 200)
        self.until(lambda: "ready:" in self.log())
        self.children = psutil.Process(self.process.pid).children(recursive=True)
        assert len(list(self.folder.glob(PREFIX + "*/engine-*.sock"))) > 0
        return self

    def metric(self, name: str) -> list[float]:
        """Values of a labelled metric."""
        lines = self.client.get("/metrics").text.splitlines()
        return [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + "{")]

    def engine(self, last: bool = False) -> psutil.Process:
        """The first that was started of those that run, or the last."""
        children = psutil.Process(self.process.pid).children()
        engines = [child for child in children if not any("http_process" in word for word in child.cmdline())]
        return sorted(engines, key=lambda child: child.create_time())[-1 if last else 0]

    def log(self) -> str:
        self._log.seek(0)
        return self._log.read()

    def stream(self, text: str = "abcdef", max_tokens: int = 10**5) -> Generator[str]:
        """Lines of a stream; the first is awaited by the caller's next()."""
        with self.client.stream("POST", "/v1/completions", json={"prompt": text, "max_tokens": max_tokens, "stream": True}) as response:
            assert response.status_code == 200
            yield from (line for line in response.iter_lines() if line)

    def nothing_left(self) -> bool:
        """No process, no socket, no folder."""
        return not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in self.children) and not list(
            self.folder.glob(PREFIX + "*")
        )

    def close(self) -> None:
        self.client.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._log.close()


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder whose path leaves room for a socket's name; pytest's own are too long."""
    with tempfile.TemporaryDirectory(prefix="js", dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture
def server(short_path: Path) -> Iterator[Callable[..., Server]]:
    """Makes servers; those that are left at the end are killed."""
    made: list[Server] = []

    def make(**arguments: Any) -> Server:
        folder = short_path / str(len(made))
        folder.mkdir()
        made.append(Server(folder, **arguments))
        return made[-1]

    yield make
    for each in made:
        each.close()


def _listening(port: int) -> list[str]:
    """What listens on a TCP port of this machine."""
    lines = subprocess.run(["ss", "-ltnH"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [line for line in lines if line.split()[3].endswith(f":{port}")]


ENDLESS = {"step_seconds": 0.02, "forever": True, "max_total_tokens": 10**6}


def test_two_engines_and_two_http_processes(server: Callable[..., Server]):
    """Probes, totals, ports; then kill -9 of the launcher."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        metrics_port = probe.getsockname()[1]
    live = server(double=ENDLESS, engine={"mesh": "2x1"}, server={"http_workers": 2, "prometheus_port": metrics_port})
    # The port is open early, and says that it is not ready.
    live.until(lambda: live.client.get("/health/live").status_code == 200)
    early = live.client.get("/health")
    assert early.status_code == 200 or (early.status_code, early.json()["error"]) == (503, "unhealthy")
    live.until_ready()
    assert len(live.children) == 4

    # Either http process tells the totals of both. A connection of its own goes to any of them.
    for _ in range(12):
        with httpx.Client(base_url=live.client.base_url) as client:
            assert client.post("/v1/completions", json={"prompt": "abc", "max_tokens": 2}).status_code == 200
    for _ in range(4):
        with httpx.Client(base_url=live.client.base_url) as client:
            assert "\ntgi_request_success 12.0\n" in client.get("/metrics").text
    live.until(lambda: sum(live.metric("vllm:generation_tokens_total")) == 24)

    # Requests are spread over the engines.
    streams = [live.stream() for _ in range(4)]
    for stream in streams:
        assert next(stream).startswith("data: {")
    live.until(lambda: min(live.metric("jaxserve_requests_running")) > 0)

    with httpx.Client(base_url=f"http://127.0.0.1:{metrics_port}") as client:
        assert "\ntgi_request_success 12.0\n" in client.get("/metrics").text
        assert client.get("/health").status_code == client.post("/generate", json={"inputs": "a"}).status_code == 404

    # Nothing but these ports listens on TCP, on loopback or elsewhere.
    assert {
        connection.laddr.port for child in live.children for connection in child.net_connections("tcp") if connection.status == "LISTEN"
    } == {live.port, metrics_port}

    live.process.kill()
    live.process.wait()
    live.until(lambda: live.nothing_left() and not _listening(live.port), 5.0)


def test_an_engine_dies_and_comes_back_but_not_for_ever(server: Callable[..., Server]):
    live = server(double={**ENDLESS, "crash_token_id": 300}).until_ready()
    stream = live.stream()
    assert next(stream).startswith("data: {")
    live.engine().kill()
    *_, error, done = stream
    assert done == "data: [DONE]"
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "engine_unavailable"
    refused = live.client.post("/v1/completions", json={"prompt": "abc"})
    assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
    assert refused.json()["error"]["code"] == "engine_unavailable"
    assert live.client.get("/health").status_code == 503 and live.client.get("/health/live").status_code == 200

    for _ in range(2):
        live.until(lambda: live.client.get("/health").status_code == 200)
        assert live.client.post("/v1/completions", json={"prompt": "abc", "max_tokens": 2}).status_code == 200
        broken = live.client.post("/v1/completions", json={"prompt": [70, 71, 300, 72, 73], "max_tokens": 5})
        assert (broken.status_code, broken.json()["error"]["code"]) == (503, "engine_unavailable")
        assert int(broken.headers["retry-after"]) > 0
    assert live.process.wait(20) == 1
    last = live.log().strip().splitlines()[-1]
    assert last == "jaxserve: error: engine 0 died 3 times in 5 minutes; the last time it ended with exit code 7"
    assert live.nothing_left() and "Traceback" not in live.log()


def test_a_dead_replica_is_taken_out_and_comes_back(server: Callable[..., Server]):
    """kill -9 of one replica under load: the other loses nothing, and takes over what had not begun."""
    live = server(double={**ENDLESS, "max_batch_size": 1}, engine={"mesh": "2x1"}).until_ready()
    streams = [live.stream(), live.stream()]  # one a replica, and no room for more
    first, second = (next(stream) for stream in streams)
    assert first.startswith("data: {") and second.startswith("data: {")
    with ThreadPoolExecutor(6) as threads:
        waiting = [threads.submit(live.client.post, "/v1/completions", json={"prompt": "abc", "max_tokens": 2}) for _ in range(6)]
        live.until(lambda: live.metric("jaxserve_requests_waiting") == [3, 3])
        live.engine().kill()

        *_, error, done = streams[0]
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "engine_unavailable" and done == "data: [DONE]"
        live.until(lambda: live.metric("jaxserve_requests_waiting")[1] == 6)
        assert live.client.get("/health").status_code == 200
        states = live.client.get("/health/ready").json()["replicas"]
        assert states == [{"replica": 0, "ready": False}, {"replica": 1, "ready": True}]
        assert (live.metric("jaxserve_engine_up"), live.metric("jaxserve_engine_losses_total")) == ([0, 1], [1, 0])
        assert all("error" not in next(streams[1]) for _ in range(5))
        streams[1].close()
        assert [answer.result().status_code for answer in waiting] == [200] * 6

    # It comes back, and takes its share; a third death of it does not end the server, because the other serves.
    for deaths in range(1, 4):
        live.until(lambda: live.metric("jaxserve_engine_up") == [1, 1])
        streams = [live.stream(), live.stream()]
        assert all(next(stream).startswith("data: {") for stream in streams)
        if deaths < 3:
            live.engine(last=True).kill()  # the youngest process
        for stream in streams:
            stream.close()
        if deaths < 3:
            live.until(lambda deaths=deaths: live.metric("jaxserve_engine_losses_total") == [deaths + 1, 0])
    assert live.process.poll() is None and "Traceback" not in live.log()
    assert live.log().count("; it is started again in ") == 3


def test_ends(server: Callable[..., Server]):
    """SIGTERM lets finish what runs, for a bounded time; a second signal ends at once."""
    live, hurried = server(double=ENDLESS, server={"graceful_termination_timeout": 3}), server(double=ENDLESS)
    short, endless = live.until_ready().stream(max_tokens=60), live.stream()
    assert next(short).startswith("data: {") and next(endless).startswith("data: {")
    held_up = hurried.until_ready().stream()
    assert next(held_up).startswith("data: {")

    live.process.send_signal(signal.SIGTERM)
    live.until(lambda: not _listening(live.port))  # no more is accepted
    lines = list(short)
    assert lines[-1] == "data: [DONE]" and len(lines) == 60

    hurried.process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    hurried.process.send_signal(signal.SIGINT)
    assert hurried.process.wait(3) == 128 + signal.SIGINT

    assert live.process.wait(10) == 0
    *_, error, done = endless
    assert '"the server is ending"' in error and done == "data: [DONE]"
    for each in (live, hurried):
        each.until(lambda each=each: each.nothing_left() and not _listening(each.port), 5.0)
        assert "Traceback" not in each.log(), each.log()


def test_startup_errors_are_one_line(server: Callable[..., Server]):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        in_use = server(server={"port": port})
        assert in_use.process.wait(20) == 1
        assert in_use.log() == f"jaxserve: error: cannot listen on 127.0.0.1 port {port}: Address already in use\n"
    engine_fails = server(double={"startup_error": "the mesh needs 8 devices;\n there is 1"})
    assert engine_fails.process.wait(30) == 1
    assert engine_fails.log().splitlines()[-1] == "jaxserve: error: the mesh needs 8 devices; there is 1"
    assert "Traceback" not in engine_fails.log()
    for each in (in_use, engine_fails):
        assert each.nothing_left()


def test_an_error_that_nobody_foresaw_ends_the_launcher(short_path: Path):
    program = (
        "import sys\n"
        "from jaxserve.config import EngineOptions, HostOptions, ModelOptions, ServerOptions\n"
        "from jaxserve.launcher.fellow_hosts import FellowHosts\n"
        "from jaxserve.launcher.launcher import launch\n"
        "async def stay(self): raise LookupError('of no kind')\n"
        "FellowHosts.stay = stay\n"
        "hosts = HostOptions('127.0.0.1:29400', 2, 1)\n"
        "sys.exit(launch(ModelOptions('m'), EngineOptions(mesh='2x1'), ServerOptions(), ('sleep', '60'), hosts))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(short_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1 and done.stderr.endswith("jaxserve: error: LookupError: of no kind\n")


@pytest.mark.parametrize(
    ("replicas", "cores", "expected"),
    [(1, 64, 1), (2, 64, 1), (3, 64, 2), (4, 64, 2), (8, 64, 4), (4, 5, 1), (4, 4, 1), (8, 2, 1), (1, 1, 1)],
)
def test_http_processes_follow_the_replicas_and_the_cores(replicas: int, cores: int, expected: int):
    assert num_http_processes(replicas, cores) == expected


@pytest.mark.parametrize(("server", "expected"), [(ServerOptions(), 2), (ServerOptions(http_workers=3), 3)])
def test_the_port_is_shared_by_as_many_http_processes(server: ServerOptions, expected: int, monkeypatch: pytest.MonkeyPatch):
    asked = []

    def refuse(hostname: str, port: int, count: int) -> list[socket.socket]:
        asked.append(count)
        raise StartupError("not here")

    monkeypatch.setattr(launcher_module, "listen", refuse)
    monkeypatch.setattr(launcher_module, "set_up_logging", lambda json_output, level: None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(64))
    assert launcher_module.launch(ModelOptions("m"), EngineOptions(mesh="4x1"), server) == 1
    assert asked == [expected]


def test_no_tokenizer_is_a_startup_error(tmp_path: Path):
    live = LiveFrontEnd(tmp_path / "nothing")
    with pytest.raises(AssertionError, match="does not get ready"):
        live.start()
    assert isinstance(live.http.failure, StartupError) and "nothing" in str(live.http.failure)
    live.stop()


def test_options_reach_children_as_json():
    options = ChildOptions(
        "/run", 1, ModelOptions("m"), EngineOptions(mesh="2x4"), ServerOptions(api_key="k", cors_allow_origin=("http://a", "http://b"))
    )
    assert ChildOptions.from_json(options.to_json()) == options


def test_replicas_see_their_own_gpus(tmp_path: Path):
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidia3", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    mesh = EngineOptions(mesh="2x2")
    assert device_environment(mesh, 1, {}, tmp_path) == {"CUDA_VISIBLE_DEVICES": "2,3"}
    assert device_environment(mesh, 0, {"CUDA_VISIBLE_DEVICES": "7,5,3,1"}, tmp_path) == {"CUDA_VISIBLE_DEVICES": "7,5"}
    assert device_environment(EngineOptions(mesh="1x4"), 0, {}, tmp_path) == {}
    assert device_environment(mesh, 1, {"JAX_PLATFORMS": "cpu"}, tmp_path) == {}
    # Of a mesh over several hosts, the replicas of this one.
    assert device_environment(EngineOptions(mesh="4x2"), 1, {}, tmp_path, count=2) == {"CUDA_VISIBLE_DEVICES": "2,3"}
    assert device_environment(EngineOptions(mesh="2x4"), 0, {}, tmp_path, count=1) == {}
    with pytest.raises(DeviceError, match="--mesh 6x2 needs 6 GPUs of each host; there are 4"):
        device_environment(EngineOptions(mesh="6x2"), 0, {}, tmp_path, count=3)
    with pytest.raises(DeviceError, match="needs 4 GPUs; there are 2"):
        device_environment(mesh, 0, {"CUDA_VISIBLE_DEVICES": "0,1"}, tmp_path)


def test_abandoned_run_folders_are_removed(short_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tempfile, "tempdir", str(short_path))
    first, first_lock = make_run_folder()
    assert first.parent == short_path
    assert first.stat().st_mode & 0o777 == 0o700
    second, second_lock = make_run_folder()
    assert first.exists()
    os.close(first_lock)  # as when its launcher died
    third, third_lock = make_run_folder()
    assert not first.exists() and second.exists() and third.exists()
    os.close(second_lock)
    os.close(third_lock)


def test_a_folder_that_another_start_took_for_abandoned_is_made_anew(short_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its lock is made and then held: in between, whoever else starts finds it as a dead server's."""
    monkeypatch.setattr(tempfile, "tempdir", str(short_path))
    hold, seen = fcntl.flock, []

    def held_late(lock: int, operation: int) -> None:
        if operation == fcntl.LOCK_EX and not seen:
            seen.extend(short_path.glob(PREFIX + "*"))
            remove_abandoned(short_path)
        hold(lock, operation)

    monkeypatch.setattr(fcntl, "flock", held_late)
    folder, lock = make_run_folder()
    assert len(seen) == 1 and not seen[0].exists() and folder.exists()
    os.close(lock)


def test_listening_sockets_share_a_port():
    sockets = listen("127.0.0.1", 0, 3)
    try:
        assert len({each.getsockname() for each in sockets}) == 1
        with pytest.raises(StartupError, match="in use"):
            listen("127.0.0.1", sockets[0].getsockname()[1], 1)
    finally:
        for each in sockets:
            each.close()
    with pytest.raises(StartupError, match="cannot listen on nowhere"):
        listen("nowhere.invalid", 0, 1)
