"""The server over HTTP: start to ready, tokens a second by concurrency, and the gaps of a stream beside long prompts.

    python -m benchmarks.over_http FOLDER [--repetitions 3] [--warm-only] [--max-decode-gap-ms 60] [--mesh 1x4 --label 70b] [--results FILE]

FOLDER holds a config.json and a tokenizer; the weights are random. The server runs with its default flags but for dummy weights, no
prefix cache, requests of at most 32768 tokens, and a folder of compiled programs of its own. ready_cold_s: from the start of the process
to the first 200 of /health with that folder empty; ready_warm_s: the same again. The other rows are of the second process.

A load is so many prompts of 1024 tokens in, 256 out at a concurrency, all offered at once with that bound: token ids uniform in
3..48999, new ones for every run, greedy, `ignore_eos`, /v1/completions streamed. Rows: output tokens a second of the whole run, median TTFT
and TPOT by the definitions of `jaxserve bench serve`; each the median of the repetitions.

With --max-decode-gap-ms a second server runs with that flag, and both are asked the same: one stream runs while prompts of 8192 tokens
arrive, four at a time. Rows: the largest gap of the stream in the meantime, and prompt tokens a second.

On a mesh the names of rows begin with its sizes and the label: tp4_70b_ready_cold_s. What replicas add is benchmarks.http_scaling's to say.
"""

import argparse
import asyncio
import json
import random
import shlex
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.rows import Rows, add_row_flags, command_line, make_rows, mesh_prefix
from benchmarks.server import Server
from jaxserve.bench.figures import RequestFigures, summarize
from jaxserve.bench.serve import measure, measure_request
from jaxserve.client import Client, connect
from jaxserve.config import parse_mesh

LOADS = ("1:16", "16:128", "64:384", "256:1024")  # concurrency:prompts
LONG_PROMPTS_AT_ONCE = 4


@dataclass
class Prompts:
    """Bodies of requests with new random token ids."""

    model: str
    vocab_size: int
    generator: random.Random = field(default_factory=lambda: random.Random(0))

    def body(self, tokens_in: int, tokens_out: int) -> dict[str, Any]:
        """One request."""
        prompt = [self.generator.randrange(3, min(49000, self.vocab_size)) for _ in range(tokens_in)]
        body = {"model": self.model, "prompt": prompt, "max_tokens": tokens_out, "temperature": 0, "ignore_eos": True}
        return body | {"stream_options": {"include_usage": True}}


async def run_load(client: Client, prompts: Prompts, concurrency: int, count: int, tokens_in: int, tokens_out: int) -> dict[str, float]:
    """Figures of one load, see `run_bodies`."""
    bodies = [prompts.body(tokens_in, tokens_out) for _ in range(count)]
    return await run_bodies(client, bodies, concurrency)


async def run_bodies(client: Client, bodies: Sequence[dict[str, Any]], concurrency: int) -> dict[str, float]:
    """Figures of requests (bench.figures.summarize), all of which must succeed with their whole output."""
    requests, seconds = await measure(client, bodies, [0.0] * len(bodies), concurrency)
    if errors := {request.error for request in requests if request.error}:
        raise RuntimeError(f"requests failed: {sorted(errors)[:3]}")
    figures = summarize(requests, seconds)
    if (wanted := sum(body["max_tokens"] for body in bodies)) != figures["total_output_tokens"]:
        raise RuntimeError(f"{figures['total_output_tokens']} output tokens came, not {wanted}")
    return figures


async def measure_loads(server: Server, arguments: argparse.Namespace, rows: Rows, prompts: Prompts) -> None:
    """Round after round over the loads, so that a run that is cut short has a figure of each; rows are medians so far."""
    command = command_line("benchmarks.over_http")
    found: dict[str, list[float]] = {}
    async with connect(server.url) as client:
        await run_load(client, prompts, 4, 4, arguments.tokens_in, min(16, arguments.tokens_out))
        for _ in range(arguments.repetitions):
            for concurrency, count in _pairs(arguments.loads):
                figures = await run_load(client, prompts, concurrency, count, arguments.tokens_in, arguments.tokens_out)
                for name, figure, unit in (
                    (f"http_c{concurrency}_tok_s", "output_throughput", "tok/s"),
                    (f"http_c{concurrency}_ttft_ms", "median_ttft_ms", "ms"),
                    (f"http_c{concurrency}_tpot_ms", "median_tpot_ms", "ms"),
                ):
                    found.setdefault(name, []).append(figures[figure])
                    rows.add(name, statistics.median(found[name]), unit, command)
                told = ", ".join(f"{name} {figures[name]:.1f}" for name in ("output_throughput", "median_ttft_ms", "median_tpot_ms"))
                print(f"concurrency {concurrency}: {told}", flush=True)


async def measure_gap(server: Server, arguments: argparse.Namespace, prompts: Prompts) -> tuple[float, float]:
    """(largest gap of a running stream in ms, prompt tokens a second) while long prompts arrive."""
    async with connect(server.url) as client:
        # Longer than the prompts take; it is left when they are done.
        stream_body = prompts.body(arguments.tokens_in, arguments.stream_tokens)
        figures = RequestFigures()
        running = asyncio.Event()

        async def read_stream() -> None:
            loop = asyncio.get_running_loop()
            async for event in client.stream("/v1/completions", stream_body):
                if event.get("choices"):
                    figures.arrivals.append(loop.time())
                    if len(figures.arrivals) == 16:
                        running.set()

        stream = asyncio.create_task(read_stream())
        first = asyncio.ensure_future(running.wait())
        await asyncio.wait([stream, first], return_when=asyncio.FIRST_COMPLETED)
        # The engine learns what a prompt's tokens cost from one that it has seen beside a stream.
        await measure_request(client, prompts.body(arguments.long_prompt, 1))
        loop = asyncio.get_running_loop()
        # In a thread: this loop must not stand still, it takes the time of the stream's events.
        bodies = await asyncio.to_thread(lambda: [prompts.body(arguments.long_prompt, 1) for _ in range(arguments.long_prompts)])
        begin = loop.time()
        requests, seconds = await measure(client, bodies, [0.0] * len(bodies), LONG_PROMPTS_AT_ONCE)
        end = loop.time()
        if stream.done():
            await stream
            raise RuntimeError("the stream ended before the prompts did: give it more --stream-tokens")
        stream.cancel()
        first.cancel()
        await asyncio.gather(stream, first, return_exceptions=True)
    if errors := {request.error for request in requests if request.error}:
        raise RuntimeError(f"requests failed: {sorted(errors)[:3]}")
    inside = [at for at in figures.arrivals if begin <= at <= end]
    largest = max(after - before for before, after in zip([begin, *inside], [*inside, end], strict=True))
    return largest * 1000, len(bodies) * arguments.long_prompt / seconds


def main() -> None:
    """Read the arguments and measure."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--mesh", default="1x1", help="the server's flag")
    parser.add_argument("--label", default="", help="part of the rows' names, for a shape or mesh of its own: 70b")
    parser.add_argument("--loads", nargs="*", default=LOADS, metavar="CONCURRENCY:PROMPTS")
    parser.add_argument("--tokens-in", type=int, default=1024)
    parser.add_argument("--tokens-out", type=int, default=256)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--warm-only", action="store_true", help="one start, on the programs in --cache as they are; no row of the start")
    parser.add_argument("--cache", type=Path, help="folder of compiled programs, emptied first without --warm-only [a temporary one]")
    parser.add_argument("--max-decode-gap-ms", type=float, help="measure the gaps of a stream, without this flag of the server and with it")
    parser.add_argument("--long-prompt", type=int, default=8192, help="tokens of a prompt beside the stream")
    parser.add_argument("--long-prompts", type=int, default=16)
    parser.add_argument("--stream-tokens", type=int, default=16384)
    parser.add_argument("--max-total-tokens", type=int, default=32768)
    parser.add_argument("--log", type=Path, default=Path(tempfile.gettempdir()) / "over_http.log", help="what the last server said")
    parser.add_argument(
        "--server-flags", type=shlex.split, default=[], help="further flags of the server, one text; the rows are then not of default flags"
    )
    add_row_flags(parser)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        _measure(arguments, arguments.cache or Path(temporary) / "cache")


def _measure(arguments: argparse.Namespace, cache: Path) -> None:
    flags = server_flags(arguments, cache)
    command, starts = command_line("benchmarks.over_http"), {}
    if not arguments.warm_only:
        shutil.rmtree(cache, ignore_errors=True)
        with Server(flags, arguments.log) as server:
            starts["ready_cold_s"] = server.ready_seconds
        print(f"ready after {server.ready_seconds:.1f} s, nothing compiled before", flush=True)
    with Server(flags, arguments.log) as server:
        print(f"ready after {server.ready_seconds:.1f} s", flush=True)
        if not arguments.warm_only:
            starts["ready_warm_s"] = server.ready_seconds
        info, model = asyncio.run(served(server))
        rows = make_rows(arguments, info["model_device_type"], mesh_prefix(parse_mesh(arguments.mesh), arguments.label))
        for name, seconds in starts.items():
            rows.add(name, seconds, "s", command)
        prompts = Prompts(model, vocab_size(arguments.folder))
        asyncio.run(measure_loads(server, arguments, rows, prompts))
        if arguments.max_decode_gap_ms:
            _add_gap(rows, server, arguments, prompts, "")
        check_server(server)
    if arguments.max_decode_gap_ms:
        with Server([*flags, "--max-decode-gap-ms", str(arguments.max_decode_gap_ms)], arguments.log) as server:
            _add_gap(rows, server, arguments, prompts, f"_bound_{arguments.max_decode_gap_ms:g}")
            check_server(server)
    rows.show()


def _add_gap(rows: Rows, server: Server, arguments: argparse.Namespace, prompts: Prompts, name: str) -> None:
    gap, rate = asyncio.run(measure_gap(server, arguments, prompts))
    command = command_line("benchmarks.over_http")
    rows.add(f"decode_gap{name}_ms", gap, "ms", command)
    rows.add(f"prefill_beside_stream{name}_tok_s", rate, "tok/s", command)


def server_flags(arguments: argparse.Namespace, cache: Path, mesh: str | None = None) -> list[str]:
    """Of a server that is measured.

    Args:
        cache: folder of its compiled programs.
        mesh: where it is not that of the arguments.
    """
    flags = ["--model-id", arguments.folder, "--load-format", "dummy", "--no-prefix-caching", "--compilation-cache-dir", str(cache)]
    return [*flags, "--mesh", mesh or arguments.mesh, "--max-total-tokens", str(arguments.max_total_tokens), *arguments.server_flags]


def check_server(server: Server) -> None:
    """Tell its steps and padding; nothing may have been compiled after it was ready.

    Raises:
        SystemExit: something was.
    """
    metrics = server.metrics()
    padded, useful = metrics["jaxserve_padded_tokens_total"], metrics["jaxserve_useful_tokens_total"]
    print(f"{metrics['jaxserve_steps_total']:.0f} steps, {padded / max(padded + useful, 1):.1%} of the tokens were padding")
    if events := metrics["jaxserve_compile_events_total"]:
        raise SystemExit(f"{events:.0f} programs were compiled after ready")


async def served(server: Server) -> tuple[dict[str, Any], str]:
    """/info, and the model's name."""
    async with connect(server.url) as client:
        return await client.get("/info"), (await client.models())[0]["id"]


def vocab_size(folder: str) -> int:
    """Of the model's config.json."""
    return json.loads((Path(folder) / "config.json").read_text())["vocab_size"]


def _pairs(loads: Sequence[str]) -> list[tuple[int, int]]:
    return [(int(concurrency), int(count)) for concurrency, count in (load.split(":") for load in loads)]


if __name__ == "__main__":
    main()
