"""How many server-sent events the http process writes for a second of its CPU time, behind the real gRPC.

    python benchmarks/front_end.py [--streams 256] [--tokens 1000] [--step-seconds 0] [--http-workers 1]
        [--replicas 1]

Each engine is a double in its own process that yields a token a stream and step, by default as fast as they are read; the http process is
the real one under uvicorn; clients are raw sockets in this process. Each stream is a chat completion with stop strings and usage, one
event a token; the counts are checked. One line of JSON tells the result.
"""

import argparse
import asyncio
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import psutil
import uvloop

TESTS = Path(__file__).resolve().parent.parent / "tests"
PROMPT = "Tell me, in as many words as you like, how the front end of a server that streams tokens spends its time."
BODY_END = b"0\r\n\r\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--step-seconds", type=float, default=0.0, help="0: as fast as they are read")
    parser.add_argument("--http-workers", type=int, default=1)
    parser.add_argument("--replicas", type=int, default=1, help="engines; the streams are spread over them")
    parser.add_argument("--tokenizer", type=Path, help="folder or .gguf file; default: a byte-level one of 320 tokens")
    arguments = parser.parse_args()
    sys.path.insert(0, str(TESTS))
    with tempfile.TemporaryDirectory() as folder:
        if arguments.tokenizer is None:
            from tiny_models import write_tokenizer

            write_tokenizer(Path(folder))
        print(json.dumps(measure(arguments, arguments.tokenizer or Path(folder))))


def measure(arguments: argparse.Namespace, tokenizer: Path) -> dict[str, object]:
    port = free_port()
    double = {
        "model_path": str(tokenizer),
        "vocab_size": 10**6,
        "max_total_tokens": arguments.tokens + 1000,
        "max_input_tokens": 999,
        "step_seconds": arguments.step_seconds,
        "forever": True,
        "max_unread": 8 * arguments.streams,
    }
    server_options = {"hostname": "127.0.0.1", "port": port, "http_workers": arguments.http_workers}
    options = {"server": server_options, "engine": {"mesh": f"{arguments.replicas}x1"}}
    server = subprocess.Popen(
        [sys.executable, str(TESTS / "engine_double.py"), "serve", json.dumps(options)],
        env={**os.environ, "ENGINE_DOUBLE": json.dumps(double)},
    )
    try:
        wait_until_ready(port, server, arguments.http_workers)
        children = psutil.Process(server.pid).children()
        workers = [child for child in children if "jaxserve.launcher.http_process" in child.cmdline()]
        engines = [child for child in children if child not in workers]
        uvloop.run(stream_all(port, arguments.streams, 20))  # connections, imports, branches taken once
        before, engines_before, began = cpu_seconds(workers), cpu_seconds(engines), time.perf_counter()
        writes = uvloop.run(stream_all(port, arguments.streams, arguments.tokens))
        wall, cpu, engines_cpu = time.perf_counter() - began, cpu_seconds(workers) - before, cpu_seconds(engines) - engines_before
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()
    events = arguments.streams * arguments.tokens
    return {
        "streams": arguments.streams,
        "tokens_per_stream": arguments.tokens,
        "step_seconds": arguments.step_seconds,
        "http_workers": arguments.http_workers,
        "replicas": arguments.replicas,
        "events": events,
        "cpu_seconds": round(cpu, 3),
        "engines_cpu_seconds": round(engines_cpu, 3),
        "wall_seconds": round(wall, 3),
        "events_per_cpu_second": round(events / cpu),
        "events_per_second": round(events / wall),
        "events_per_read": round(events / writes, 2),
        "python": platform.python_version(),
        **{name: version(name) for name in ("uvicorn", "fastapi", "grpcio", "uvloop")},
    }


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def wait_until_ready(port: int, server: subprocess.Popen[bytes], http_workers: int) -> None:
    """Return once as many connections in a row are answered as surely go to all http processes."""
    num_answered = 0
    while server.poll() is None and num_answered < 10 * http_workers:
        try:
            with socket.create_connection(("127.0.0.1", port), 5) as connection:
                connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")
                if b" 200 " in connection.recv(4096):
                    num_answered += 1
                    continue
        except OSError:
            pass
        num_answered = 0
        time.sleep(0.1)
    if server.poll() is not None:
        sys.exit("the server ended")


def cpu_seconds(processes: list[psutil.Process]) -> float:
    return sum(times.user + times.system for process in processes for times in [process.cpu_times()])


async def stream_all(port: int, streams: int, tokens: int) -> int:
    """Run the streams at once; returns how many reads brought their events."""
    return sum(await asyncio.gather(*(stream(port, tokens) for _ in range(streams))))


async def stream(port: int, tokens: int) -> int:
    """Run one stream; exits unless every token was an event of its own."""
    body = json.dumps(
        {
            "messages": [{"role": "user", "content": PROMPT}],
            "max_tokens": tokens,
            "stop": ["</answer>", "\n\n\n", "The end."],
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0,
        }
    ).encode()
    loop = asyncio.get_running_loop()
    transport, reader = await loop.create_connection(CountingReader, "127.0.0.1", port)
    transport.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body
    )
    await reader.ended
    transport.close()
    # Beside the tokens: the role, the usage and [DONE].
    if reader.num_events != tokens + 3:
        sys.exit(f"{reader.num_events} events for {tokens} tokens; the last data: {reader.tail!r}")
    return reader.num_reads


class CountingReader(asyncio.Protocol):
    """Counts events by their beginnings, also where two reads cut one."""

    def __init__(self) -> None:
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.num_events = 0
        self.num_reads = 0
        self.tail = b""

    def data_received(self, data: bytes) -> None:
        self.num_reads += 1
        joined = self.tail[-5:] + data
        self.num_events += joined.count(b"data: ")
        self.tail = joined[-200:]
        if data.endswith(BODY_END):
            self.ended.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_exception(exc or ConnectionError("closed by the server"))


if __name__ == "__main__":
    main()
