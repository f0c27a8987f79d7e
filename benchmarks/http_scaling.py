"""What replicas add over HTTP: output tokens a second of `--mesh DxT` over those of one replica, `--mesh 1xT`, on the same machine.

    python -m benchmarks.http_scaling FOLDER --mesh 4x1 --label 8b [--streams 64] [--prompts 256] [--repetitions 3] [--results FILE]

FOLDER holds a config.json and a tokenizer; the weights are random. Servers and prompts are those of benchmarks.over_http. One replica is
offered --prompts prompts, --streams of them at once, by one client process; the mesh so much for each replica, by as many client
processes, which begin together. A rate is the output tokens of all over the time from the first client's begin to the last one's end.

Rows, with the mesh and the label in front (dp4_8b_http_scaling): http_scaling, the ratio of the medians of the repetitions, and both
medians, http_c256_tok_s and http_one_replica_c64_tok_s. The clients' share of a CPU is printed: those without time left measure themselves.
"""

import argparse
import asyncio
import multiprocessing
import random
import shlex
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from threading import Barrier
from typing import Self

from benchmarks.over_http import Prompts, check_server, run_bodies, served, server_flags, vocab_size
from benchmarks.rows import add_row_flags, command_line, make_rows, mesh_prefix
from benchmarks.server import Server
from jaxserve.client import connect
from jaxserve.config import parse_mesh

BEGIN_TIMEOUT = 60.0  # seconds that a client process waits for the others


@dataclass(frozen=True)
class Load:
    """What one client process offers; `prompts` in all, `streams` of them at once."""

    streams: int
    prompts: int
    tokens_in: int
    tokens_out: int


@dataclass(frozen=True)
class Span:
    """What a client process saw: monotonic clock at its begin and end in seconds, output tokens, CPU seconds."""

    begin: float
    end: float
    tokens: float
    cpu: float


def rate(spans: Sequence[Span]) -> float:
    """Output tokens a second of clients together."""
    return sum(span.tokens for span in spans) / (max(span.end for span in spans) - min(span.begin for span in spans))


def offer(url: str, prompts: Prompts, load: Load, together: Barrier) -> Span:
    """Run a load once all clients have made theirs (in a process of its own)."""

    async def run() -> Span:
        bodies = [prompts.body(load.tokens_in, load.tokens_out) for _ in range(load.prompts)]
        async with connect(url) as client:
            together.wait(BEGIN_TIMEOUT)
            begin, cpu = time.monotonic(), time.process_time()
            figures = await run_bodies(client, bodies, load.streams)
            return Span(begin, time.monotonic(), figures["total_output_tokens"], time.process_time() - cpu)

    return asyncio.run(run())


class Clients:
    """Client processes, from `with` to its end.

    Args:
        most: of them.
    """

    def __init__(self, most: int):
        spawn = multiprocessing.get_context("spawn")
        self._manager, self._processes = spawn.Manager(), ProcessPoolExecutor(most, spawn)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._processes.shutdown(cancel_futures=True)
        self._manager.shutdown()

    def measure(self, server: Server, folder: str, count: int, load: Load, repetitions: int) -> float:
        """Median rate of so many of them, each with a load of its own; one short run comes before."""
        _, model = asyncio.run(served(server))
        size, rates, together = vocab_size(folder), [], self._manager.Barrier(count)

        def run(name: str, load: Load) -> list[Span]:
            prompts = [Prompts(model, size, random.Random(f"{name} {client}")) for client in range(count)]
            futures = [self._processes.submit(offer, server.url, each, load, together) for each in prompts]
            return [future.result() for future in futures]

        run("first", Load(4, 4, load.tokens_in, min(16, load.tokens_out)))
        for repetition in range(repetitions):
            spans = run(str(repetition), load)
            rates.append(rate(spans))
            shares = ", ".join(f"{span.cpu / (span.end - span.begin):.0%}" for span in spans)
            print(f"{count} x {load.streams} streams: {rates[-1]:.0f} tok/s; the clients used {shares} of a CPU", flush=True)
        return statistics.median(rates)


def main() -> None:
    """Read the arguments and measure."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--mesh", required=True, help="the server's flag; at least two replicas")
    parser.add_argument("--label", default="", help="part of the rows' names: 8b")
    parser.add_argument("--streams", type=int, default=64, help="of a replica at once")
    parser.add_argument("--prompts", type=int, default=256, help="of a replica")
    parser.add_argument("--tokens-in", type=int, default=1024)
    parser.add_argument("--tokens-out", type=int, default=256)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--cache", type=Path, help="folder of compiled programs, used as it is [a temporary one]")
    parser.add_argument("--max-total-tokens", type=int, default=32768)
    parser.add_argument("--log", type=Path, default=Path(tempfile.gettempdir()) / "http_scaling.log", help="what the last server said")
    parser.add_argument("--server-flags", type=shlex.split, default=[], help="further flags of both servers, one text")
    add_row_flags(parser)
    arguments = parser.parse_args()
    data, tensor = parse_mesh(arguments.mesh)
    if data < 2:
        parser.error(f"--mesh {arguments.mesh} has one replica")
    load = Load(arguments.streams, arguments.prompts, arguments.tokens_in, arguments.tokens_out)
    rates, device = {}, ""
    with Clients(data) as clients, ExitStack() as stack:
        cache = arguments.cache or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for replicas in (1, data):
            with Server(server_flags(arguments, cache, f"{replicas}x{tensor}"), arguments.log) as server:
                print(f"{replicas} replicas ready after {server.ready_seconds:.1f} s", flush=True)
                device = asyncio.run(served(server))[0]["model_device_type"]
                rates[replicas] = clients.measure(server, arguments.folder, replicas, load, arguments.repetitions)
                check_server(server)
    rows = make_rows(arguments, device, mesh_prefix((data, tensor), arguments.label))
    command = command_line("benchmarks.http_scaling")
    rows.add(f"http_one_replica_c{load.streams}_tok_s", rates[1], "tok/s", command)
    rows.add(f"http_c{data * load.streams}_tok_s", rates[data], "tok/s", command)
    rows.add("http_scaling", rates[data] / rates[1], "x", command)
    rows.show()


if __name__ == "__main__":
    main()
