"""`jaxserve bench throughput|latency|serve`."""

import asyncio
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from jaxserve.bench.options import LatencyOptions, ServeOptions, ThroughputOptions, WorkloadOptions
from jaxserve.bench.report import Report, describe_options
from jaxserve.cli.flags import Parser, add_flags, parse, read_flags
from jaxserve.config import EngineOptions, ModelOptions
from jaxserve.errors import StartupError


def run(arguments: Sequence[str]) -> int:
    """Run a benchmark, show its figures and keep them where --output-json says."""
    if not arguments or arguments[0] not in BENCHMARKS:
        overview = _overview()
        parse(overview, arguments)
        overview.error(f"say which benchmark: {', '.join(BENCHMARKS)}")
    benchmark = BENCHMARKS[arguments[0]]
    parser = Parser(
        f"jaxserve bench {arguments[0]}", description=f"Measure {benchmark.told}. Definitions as in `vllm bench {arguments[0]}`."
    )
    for options in benchmark.options:
        add_flags(parser, options, options.__name__.removesuffix("Options").lower())
    parsed = parse(parser, arguments[1:])
    report, output_json = benchmark.measure(
        # The model's and the engine's options have environment variables, the benchmark's own have not.
        *(
            read_flags(parser, parsed, options, os.environ if options in (ModelOptions, EngineOptions) else {})
            for options in benchmark.options
        )
    )
    report.show()
    if output_json:
        report.save(output_json)
    return 0


def _throughput(
    options: ThroughputOptions, workload: WorkloadOptions, model: ModelOptions, engine: EngineOptions
) -> tuple[Report, str | None]:
    from jaxserve.bench.offline import bench_throughput
    from jaxserve.llm import LLM

    _check_profile(options.profile, engine)
    with LLM(**asdict(model), **asdict(engine)) as llm:
        return _with_options(bench_throughput(llm, options, workload), model, engine), options.output_json


def _latency(options: LatencyOptions, model: ModelOptions, engine: EngineOptions) -> tuple[Report, str | None]:
    from jaxserve.bench.offline import bench_latency
    from jaxserve.llm import LLM

    _check_profile(options.profile, engine)
    with LLM(**asdict(model), **asdict(engine)) as llm:
        return _with_options(bench_latency(llm, options), model, engine), options.output_json


def _check_profile(folder: str | None, engine: EngineOptions) -> None:
    if folder is not None and engine.data_size > 1:
        raise StartupError(f"--profile looks at one replica, in this process: --mesh 1x{engine.tensor_size}. Given: --mesh {engine.mesh}")


def _serve(options: ServeOptions, workload: WorkloadOptions) -> tuple[Report, str | None]:
    from jaxserve.bench.serve import bench_serve

    return asyncio.run(bench_serve(options, workload)), options.output_json


@dataclass(frozen=True, slots=True)
class Benchmark:
    """What is measured, the classes of its options in the order that `measure` takes them, and `measure` itself."""

    told: str
    options: tuple[type, ...]
    measure: Callable[..., tuple[Report, str | None]]


BENCHMARKS = {
    "throughput": Benchmark(
        "the engine in this process, all requests at once: tokens a second",
        (ThroughputOptions, WorkloadOptions, ModelOptions, EngineOptions),
        _throughput,
    ),
    "latency": Benchmark(
        "the engine in this process, one batch after the other: seconds a batch", (LatencyOptions, ModelOptions, EngineOptions), _latency
    ),
    "serve": Benchmark("a running server over HTTP: TTFT, TPOT, ITL, E2EL and tokens a second", (ServeOptions, WorkloadOptions), _serve),
}


def _with_options(report: Report, *options: Any) -> Report:
    return replace(report, options=describe_options(*options) | dict(report.options))


def _overview() -> Parser:
    modes = "\n".join(f"  {name:<12}{benchmark.told}" for name, benchmark in BENCHMARKS.items())
    return Parser("jaxserve bench", usage=f"jaxserve bench {{{','.join(BENCHMARKS)}}} [flags]", epilog=f"benchmarks:\n{modes}")
