"""Engines on tiny checkpoints for tests: the runner is compiled once a session, each engine gets a scheduler of its own."""

import functools
import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from jaxserve.config import EngineOptions, ModelOptions
from jaxserve.engine.build import join
from jaxserve.engine.engine import Engine
from jaxserve.request import EngineInfo, FinishReason, Request, SamplingParams, TokenOutput
from jaxserve.runner import ModelRunner, RunnerConfig, make_mesh
from jaxserve.structured import GrammarCompiler, read_tokens
from jaxserve.tokenizer import load_tokenizer
from jaxserve.weights import ModelSource
from jaxserve.weights.loader import load_model

TIMEOUT = 60.0  # seconds that outputs may take
FEW_PROGRAMS: dict[str, Any] = {"slots": 2, "max_batch_tokens": 32, "kv_tokens": 240, "max_total_tokens": 240, "masked": False}
"""Sizes of the tiny runners that several devices share."""


def kept_programs(folder: Path) -> str:
    """Where the programs of a checkpoint's tiny runner are for the rest of the session."""
    return str(folder.with_name(f"{folder.name}-compiled"))


class FewPages:
    """A runner that tells of fewer pages than its cache has, so that samples preempt each other; they are all of one KV group."""

    def __init__(self, runner: ModelRunner, num_pages: int):
        self.kv_groups: list[tuple[int, int | None]] = [(num_pages, None)]
        self._runner = runner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)


class TinyRunner:
    """A warmed-up runner of a tiny checkpoint, for any number of engines one after the other.

    Args:
        folder: of the checkpoint.
        tensor_size: devices.
        data_index: which replica.
        slots: samples that run at once; each size of batch up to it is a program to compile.
        max_batch_tokens: of a step; likewise.
        kv_tokens: room in the cache.
        max_total_tokens: of a request.
        masked: its engines enforce grammars.
        deterministic, compilation_cache_dir: as in RunnerConfig.
    """

    def __init__(
        self,
        folder: Path,
        tensor_size: int = 1,
        data_index: int = 0,
        slots: int = 4,
        max_batch_tokens: int = 64,
        kv_tokens: int = 640,
        max_total_tokens: int = 512,
        masked: bool = True,
        deterministic: bool = False,
        compilation_cache_dir: str | None = None,
    ):
        mesh = make_mesh(tensor_size, data_index)
        model = load_model(ModelSource(str(folder), "", folder), ModelOptions(), mesh)
        token_bytes = 2 * 4 * model.config.head_dim * model.config.local_kv_heads(tensor_size) * model.config.num_layers
        self.config = RunnerConfig(
            max_batch_size=slots,
            max_batch_tokens=max_batch_tokens,
            max_total_tokens=max_total_tokens,
            kv_bytes=kv_tokens * token_bytes,
            masked=masked,
            deterministic=deterministic,
            compilation_cache_dir=compilation_cache_dir,
        )
        self.runner = ModelRunner(model, mesh, self.config)
        self.runner.warmup()
        self._model = model
        self._mesh = f"1x{tensor_size}"
        self.tokenizer = load_tokenizer(folder)
        self._masked = masked

    def engine(self, eos_token_ids: Sequence[int] = (), kv_tokens: int | None = None, **options: object) -> Engine:
        """A new engine with an empty prefix cache.

        Args:
            kv_tokens: those of the cache that it may use, and the most of a request; None: all.
            options: EngineOptions.
        """
        runner, max_total_tokens = self.runner, self.runner.max_total_tokens
        if kv_tokens is not None:
            runner, max_total_tokens = cast(ModelRunner, FewPages(runner, kv_tokens // self.config.page_size)), kv_tokens
        info = EngineInfo(
            model_id="tiny",
            revision="",
            model_path="",
            vocab_size=self._model.config.vocab_size,
            max_total_tokens=max_total_tokens,
            max_input_tokens=max_total_tokens - 1,
            eos_token_ids=tuple(eos_token_ids),
            page_size=self.config.page_size,
            num_pages=runner.kv_groups[0][0],
            mesh=self._mesh,
            dtype="float32",
            device="cpu",
            defaults={},
            windows=tuple(window or 0 for _, window in runner.kv_groups),
        )
        options_ = EngineOptions(**options)  # pyright: ignore[reportArgumentType]
        if not self._masked:
            return join(runner, self.config, options_, info)
        return join(
            runner, self.config, options_, info, GrammarCompiler(read_tokens(self.tokenizer.pipeline, info.vocab_size, eos_token_ids))
        )


@functools.cache
def tiny_runner(folder: Path, **options: Any) -> TinyRunner:
    """The runner of a checkpoint and mesh, compiled once a session. One of default sizes leaves its programs in `kept_programs`."""
    return TinyRunner(folder, **options) if options else TinyRunner(folder, compilation_cache_dir=kept_programs(folder))


def greedy(max_tokens: int, **options: object) -> SamplingParams:
    """Greedy parameters that run to max_tokens."""
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, **options)  # pyright: ignore[reportArgumentType]


def finish(engine: Engine) -> dict[tuple[str, int], list[TokenOutput]]:
    """Step until nothing is left; outputs by (request id, sample index)."""
    outputs: dict[tuple[str, int], list[TokenOutput]] = {}
    while engine.has_work:
        for output in engine.step():
            outputs.setdefault((output.request_id, output.index), []).append(output)
    return outputs


def tokens_of(outputs: list[TokenOutput]) -> list[int]:
    """All tokens of a sample that has ended."""
    assert outputs[-1].finish_reason not in (None, FinishReason.ERROR)
    return [token for output in outputs for token in output.token_ids]


def run_alone(engine: Engine, prompt: Sequence[int], params: SamplingParams) -> list[int]:
    """Tokens of one request with the engine to itself."""
    engine.add_request(Request("alone", tuple(prompt), params))
    return tokens_of(finish(engine)["alone", 0])


@functools.cache
def load_goldens(name: str) -> tuple[list[list[int]], list[list[int]]]:
    """32 prompts of 1 to 200 tokens, and what transformers continues each with when it is alone; no near ties."""
    goldens = json.loads((Path(__file__).parent / "goldens" / "load.json").read_text())[name]
    return [golden["prompt"] for golden in goldens], [golden["tokens"] for golden in goldens]


class Outputs:
    """A sink that can be waited for."""

    def __init__(self) -> None:
        self.puts: list[list[TokenOutput]] = []
        self._changed = threading.Condition()

    def put(self, outputs: list[TokenOutput]) -> None:
        with self._changed:
            self.puts.append(outputs)
            self._changed.notify_all()

    def wait(self, done: Callable[[list[TokenOutput]], bool]) -> list[TokenOutput]:
        """All outputs so far, once they satisfy `done`."""
        with self._changed:
            assert self._changed.wait_for(lambda: done(self.all), TIMEOUT)
            return self.all

    @property
    def all(self) -> list[TokenOutput]:
        return [output for put in self.puts for output in put]


def ended(count: int) -> Callable[[list[TokenOutput]], bool]:
    """Whether this many samples have ended."""
    return lambda outputs: sum(output.finish_reason is not None for output in outputs) == count
