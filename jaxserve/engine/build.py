"""From options to an engine that is ready: a start, a runner, a scheduler."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace

from jaxserve.config import EngineOptions, ModelOptions
from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.engine.constraints import Constraints
from jaxserve.engine.decode_gap import DecodeGap
from jaxserve.engine.engine import Engine
from jaxserve.engine.start import Found, begin_start
from jaxserve.errors import StartupError
from jaxserve.lowering_processes import LoweringProcesses
from jaxserve.models import Model, ModelConfig
from jaxserve.request import EngineInfo
from jaxserve.runner import Hosts, ModelRunner, RunnerConfig
from jaxserve.scheduler import KVGroupPages, Scheduler, SchedulerConfig
from jaxserve.structured import GrammarCompiler, read_tokens
from jaxserve.tokenizer import Tokenizer, load_pipeline
from jaxserve.weights import ModelSource


def build_engine(
    model_options: ModelOptions,
    engine_options: EngineOptions,
    replica: int = 0,
    *,
    source: ModelSource | None = None,
    tokenizer: Tokenizer | None = None,
    hosts: Hosts | None = None,
    found: Found | None = None,
    processes: LoweringProcesses | None = None,
) -> Engine:
    """Load a model on its devices and compile every program that a legal request can hit.

    Args:
        replica: the engine takes the devices from replica * tensor size on.
        source: the model's files, where they were found already.
        tokenizer: the model's, where it was loaded already.
        hosts: those that the mesh spans, where they are several; this one leads them.
        found: is told the path of the model's files as soon as they are there, and what makes their fingerprint.
        processes: for programs that must be lowered, where they were started already; they are closed.

    Raises:
        StartupError: one line says why.
    """
    start = begin_start(model_options, engine_options, replica, source, hosts, found, processes)
    source, mesh, opened = start.source, start.mesh, start.opened
    with closing(start.preparation) as preparation, ThreadPoolExecutor(1, "grammars") as thread:
        compiler = thread.submit(_grammar_compiler, source, opened.architecture.config, engine_options, tokenizer)
        model = start.load()
        runner = ModelRunner(model, mesh, start.config, preparation, hosts)
        runner.warmup()
    info = _info(source, engine_options, model, runner, mesh.devices.flat[0].device_kind)
    return join(runner, start.config, engine_options, info, compiler.result())


def join(
    runner: ModelRunner,
    config: RunnerConfig,
    options: EngineOptions,
    info: EngineInfo,
    compiler: GrammarCompiler | str = "the engine was made without",
) -> Engine:
    """A new scheduler for a runner that is ready, and the engine of both.

    Args:
        compiler: of grammars, or why there is none.
    """
    constraints = Constraints(compiler, info.vocab_size) if isinstance(compiler, GrammarCompiler) else None
    info = replace(info, no_grammars="" if isinstance(compiler, GrammarCompiler) else compiler)
    gap = None if options.max_decode_gap_ms is None else DecodeGap(options.max_decode_gap_ms / 1000)
    scheduler = Scheduler(
        SchedulerConfig(
            max_batch_size=config.max_batch_size,
            max_batch_tokens=runner.step_sizes[-1],
            page_size=config.page_size,
            max_total_tokens=info.max_total_tokens,
            prefix_caching=options.prefix_caching,
            eos_token_ids=frozenset(info.eos_token_ids),
            max_prefill_tokens_while_decoding=None if gap is None else gap.max_prefill_tokens,
            step_sizes=runner.step_sizes,
            max_scored_tokens=runner.max_scored_tokens,
        ),
        [KVGroupPages(num_pages, window) for num_pages, window in runner.kv_groups],
    )
    return Engine(runner, scheduler, info, sync=options.sync, decode_gap=gap, constraints=constraints)


def build_async_engine(
    model_options: ModelOptions,
    engine_options: EngineOptions,
    replica: int = 0,
    hosts: Hosts | None = None,
    found: Found | None = None,
    processes: LoweringProcesses | None = None,
) -> AsyncEngine:
    """`build_engine` in a thread of its own.

    Args:
        replica: as for build_engine(); 0 where the process sees only its own devices.
        hosts, found, processes: as for build_engine().

    Raises:
        StartupError: one line says why.
    """
    engine = build_engine(model_options, engine_options, replica, hosts=hosts, found=found, processes=processes)
    return AsyncEngine(engine, engine_options.max_concurrent_requests, None if hosts is None else hosts.why_failed)


def _grammar_compiler(
    source: ModelSource, model: ModelConfig, options: EngineOptions, tokenizer: Tokenizer | None
) -> GrammarCompiler | str:
    """A compiler for the model's vocabulary, or why there can be none."""
    if options.disable_grammar_support:
        return "the server was started with --disable-grammar-support"
    try:
        pipeline = load_pipeline(source.path) if tokenizer is None else tokenizer.pipeline
        return GrammarCompiler(read_tokens(pipeline, model.vocab_size, model.eos_token_ids))
    except StartupError as error:
        return str(error)


def _info(source: ModelSource, options: EngineOptions, model: Model, runner: ModelRunner, device: str) -> EngineInfo:
    longest = runner.max_total_tokens
    return EngineInfo(
        model_id=source.model_id,
        revision=source.revision,
        model_path=str(source.path),
        vocab_size=model.config.vocab_size,
        max_total_tokens=longest,
        max_input_tokens=min(options.max_input_tokens or longest - 1, longest - 1),
        eos_token_ids=tuple(model.config.eos_token_ids),
        page_size=options.page_size,
        num_pages=runner.kv_groups[0][0],
        mesh=options.mesh,
        dtype=str(model.dtype),
        device=device,
        deterministic=options.deterministic,
        kv_cache_dtype=str(model.kv_dtype) if options.kv_dtype is None else options.kv_dtype.replace("float8", "fp8"),
        quantization=model.config.quantization.description,
        weight_bytes=model.nbytes,
        windows=tuple(window or 0 for _, window in runner.kv_groups),
        defaults={name: int(value) if name == "top_k" else value for name, value in model.config.defaults},
    )
