"""From options to an engine that is ready: files, mesh, weights, programs, scheduler."""

import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from jaxserve.config import EngineOptions, ModelOptions
from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.engine.constraints import Constraints
from jaxserve.engine.decode_gap import DecodeGap
from jaxserve.engine.engine import Engine
from jaxserve.errors import StartupError
from jaxserve.models import Model, ModelConfig, check_attention
from jaxserve.request import EngineInfo
from jaxserve.runner import ModelRunner, Preparation, RunnerConfig, make_mesh
from jaxserve.scheduler import KVGroupPages, Scheduler, SchedulerConfig
from jaxserve.structured import GrammarCompiler, read_tokens
from jaxserve.tokenizer import Tokenizer, load_pipeline
from jaxserve.weights import ModelSource, resolve_model
from jaxserve.weights.demo import cache_folder
from jaxserve.weights.loader import open_model, read_config, resolve_dtype

logger = logging.getLogger(__name__)


def build_engine(
    model_options: ModelOptions,
    engine_options: EngineOptions,
    replica: int = 0,
    *,
    source: ModelSource | None = None,
    tokenizer: Tokenizer | None = None,
) -> Engine:
    """Load a model on its devices and compile every program that a legal request can hit.

    Args:
        replica: the engine takes the devices from replica * tensor size on.
        source: the model's files, where they were found already.
        tokenizer: the model's, where it was loaded already.

    Raises:
        StartupError: one line says why.
    """
    _check_deterministic(engine_options)
    source = source or resolve_model(model_options)
    limit_gpu_memory(engine_options)
    mesh = make_mesh(engine_options.tensor_size, replica)
    platform = mesh.devices.flat[0].platform
    logger.info("devices: %d x %s", mesh.size, mesh.devices.flat[0].device_kind)
    attention = engine_options.attention
    if attention != "auto":  # before the weights, which take long
        shape = read_config(source)
        dtype = resolve_dtype(model_options.dtype, shape, platform)
        check_attention(shape, attention, dtype, engine_options.page_size, engine_options.tensor_size)
    opened = open_model(source, model_options, mesh, attention=attention)
    config = RunnerConfig.from_options(engine_options, platform, str(compilation_cache(engine_options)))
    nbytes = opened.nbytes(engine_options.tensor_size)
    with (
        closing(Preparation(opened.architecture, opened.dtype, mesh, config, weights_to_come=nbytes)) as preparation,
        ThreadPoolExecutor(1, "grammars") as thread,
    ):
        compiler = thread.submit(_grammar_compiler, source, opened.architecture.config, engine_options, tokenizer)
        begin = time.monotonic()
        model = opened.load(mesh)
        logger.info("%.1f GiB of weights after %.1f s", model.nbytes / 2**30, time.monotonic() - begin)
        runner = ModelRunner(model, mesh, config, preparation)
        runner.warmup()
    info = _info(source, engine_options, model, runner, mesh.devices.flat[0].device_kind)
    return join(runner, config, engine_options, info, compiler.result())


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
            max_batch_tokens=config.max_batch_tokens,
            page_size=config.page_size,
            max_total_tokens=info.max_total_tokens,
            prefix_caching=options.prefix_caching,
            eos_token_ids=frozenset(info.eos_token_ids),
            max_prefill_tokens_while_decoding=None if gap is None else gap.max_prefill_tokens,
            step_sizes=runner.step_sizes,
        ),
        [KVGroupPages(num_pages, window) for num_pages, window in runner.kv_groups],
    )
    return Engine(runner, scheduler, info, sync=options.sync, decode_gap=gap, constraints=constraints)


def compilation_cache(options: EngineOptions) -> Path:
    """The folder of compiled programs."""
    return Path(options.compilation_cache_dir or cache_folder() / "xla")


def build_async_engine(model_options: ModelOptions, engine_options: EngineOptions, replica: int = 0) -> AsyncEngine:
    """`build_engine` in a thread of its own.

    Args:
        replica: as for build_engine(); 0 where the process sees only its own devices.

    Raises:
        StartupError: one line says why.
    """
    return AsyncEngine(build_engine(model_options, engine_options, replica), engine_options.max_concurrent_requests)


def _check_deterministic(options: EngineOptions) -> None:
    """Refuse what --deterministic cannot go with.

    Raises:
        StartupError: naming the other flag.
    """
    if not options.deterministic:
        return
    if options.attention == "mosaic":
        raise StartupError(
            "--deterministic needs its own attention kernel, of Triton: --attention must be auto, triton or xla. Given: mosaic"
        )
    if options.max_decode_gap_ms is not None:
        raise StartupError(
            "--max-decode-gap-ms does nothing under --deterministic: its steps all take as long. Set --max-batch-prefill-tokens"
        )


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
        defaults={name: int(value) if name == "top_k" else value for name, value in model.config.defaults},
    )


def limit_gpu_memory(options: EngineOptions) -> None:
    """Tell JAX its share of a GPU; heeded only before the process has used one. A user's own variable goes before the flag."""
    if not {"XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"} & os.environ.keys():
        os.environ["XLA_CLIENT_MEM_FRACTION"] = str(options.cuda_memory_fraction)
