"""EngineDouble: an engine without a model, for tests and benchmarks of everything in front of the engine.

It has AsyncEngine's interface. Greedy requests answer with their own prompt (special tokens left out) and then end; a seed or a
temperature rotates the answer, so that samples differ. As a program it is an engine process, or a whole server:

    python tests/engine_double.py DESCRIPTOR                      what the launcher starts
    python tests/engine_double.py serve FOLDER [JSON options]     a launcher whose engines are doubles

Options come as JSON in the variable ENGINE_DOUBLE: the arguments of EngineDouble, or a `startup_error`.
"""

import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxserve.errors import EngineUnavailable, InvalidRequest, Overloaded, StartupError
from jaxserve.request import EngineInfo, EngineStats, FinishReason, PromptLogprobs, Request, TokenLogprobs, TokenOutput


@dataclass
class _Running:
    request: Request
    sink: Any
    answer: list[int]
    index: int
    num_output_tokens: int = 0


@dataclass
class EngineDouble:
    """Yields one token a step and sample.

    Args:
        model_path: tokenizer folder, told to front ends.
        step_seconds: time between steps; 0 is as fast as the sinks are read.
        max_concurrent_requests: permits.
        special_token_ids: left out of answers.
        fail_token_id: a prompt that holds it fails at its third step.
        crash_token_id: a prompt that holds it ends this process at its third step.
        forever: never stop by itself: the answer repeats.
    """

    model_path: str
    vocab_size: int = 512
    max_total_tokens: int = 2048
    max_input_tokens: int = 2047
    eos_token_ids: tuple[int, ...] = (0,)
    special_token_ids: tuple[int, ...] = (0, 1, 2)
    step_seconds: float = 0.0
    max_concurrent_requests: int = 1024
    max_batch_size: int = 1024
    fail_token_id: int = -1
    crash_token_id: int = -1
    forever: bool = False
    defaults: dict[str, float] = field(default_factory=dict)
    max_unread: int = 256

    def __post_init__(self) -> None:
        self.failure: str | None = None
        self.info = EngineInfo(
            model_id="double", revision="", model_path=self.model_path, vocab_size=self.vocab_size, max_total_tokens=self.max_total_tokens,
            max_input_tokens=self.max_input_tokens, eos_token_ids=tuple(self.eos_token_ids), page_size=16, num_pages=1000, mesh="1x1",
            dtype="float32", device="double", defaults=self.defaults,
        )  # fmt: skip
        self.counters = dict(num_steps=0, prompt_tokens=0, output_tokens=0)
        self._lock = threading.Condition()
        self._samples: list[_Running] = []
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, sink: Any) -> None:
        request.validate(self.info)
        with self._lock:
            if self.failure is not None:
                raise EngineUnavailable(self.failure)
            if self._closing:
                raise EngineUnavailable
            running = {sample.request.request_id for sample in self._samples}
            if request.request_id in running:
                raise InvalidRequest(f"request id {request.request_id} is in use", "request_id")
            if len(running) >= self.max_concurrent_requests:
                raise Overloaded
            self.counters["prompt_tokens"] += len(request.prompt_token_ids)
            self._samples += [_Running(request, sink, self._answer(request, index), index) for index in range(request.params.n)]
            self._lock.notify_all()

    def abort(self, request_id: str, index: int | None = None) -> None:
        with self._lock:
            self._samples = [s for s in self._samples if s.request.request_id != request_id or index not in (None, s.index)]
            self._lock.notify_all()

    def stats(self) -> EngineStats:
        with self._lock:
            running = min(len(self._samples), self.max_batch_size)
            return EngineStats(num_running=running, num_waiting=len(self._samples) - running, num_pages=1000, **self.counters)  # pyright: ignore[reportArgumentType]

    def watch_pages(self, watcher: Any) -> None:
        """It holds no pages."""

    def unwatch_pages(self, watcher: Any) -> None:
        pass

    def drain(self, timeout: float) -> bool:
        with self._lock:
            return self._lock.wait_for(lambda: not self._samples, timeout)

    def close(self) -> None:
        with self._lock:
            self._closing = True
            self._lock.notify_all()
        self._thread.join()

    def _answer(self, request: Request, index: int) -> list[int]:
        answer = [token for token in request.prompt_token_ids if token not in self.special_token_ids] or [self.special_token_ids[-1] + 1]
        turn = (index + (request.params.seed or 0)) % len(answer) if not request.params.greedy else 0
        return answer[turn:] + answer[:turn]

    def _run(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._samples or self._closing)
                if self._closing:
                    return
                by_sink: dict[int, tuple[Any, list[TokenOutput]]] = {}
                for sample, output in self._step():
                    by_sink.setdefault(id(sample.sink), (sample.sink, []))[1].append(output)
                self._lock.notify_all()
            for sink, outputs in by_sink.values():
                sink.put(outputs)
            time.sleep(self.step_seconds)
            while self.step_seconds == 0 and any(getattr(sink, "num_pending", 0) > self.max_unread for sink, _ in by_sink.values()):
                time.sleep(0.0002)

    def _step(self) -> Iterator[tuple[_Running, TokenOutput]]:
        self.counters["num_steps"] += 1
        for sample in self._samples[: self.max_batch_size]:
            output = self._next(sample)
            self.counters["output_tokens"] += len(output.token_ids)
            if output.finish_reason is not None:
                self._samples.remove(sample)
            yield sample, output

    def _next(self, sample: _Running) -> TokenOutput:
        request, params, done = sample.request, sample.request.params, sample.num_output_tokens
        output = TokenOutput(
            request.request_id, sample.index, [], [], num_cached_tokens=len(request.prompt_token_ids) // 2, queue_time=0.001
        )
        if done == 2 and self.crash_token_id in request.prompt_token_ids:
            os._exit(7)
        if done == 2 and self.fail_token_id in request.prompt_token_ids:
            output.finish_reason, output.error = FinishReason.ERROR, "the step failed"
            return output
        if params.grammar is not None and params.grammar.text == "refused":
            output.finish_reason, output.error = FinishReason.INVALID, "the grammar is refused"
            return output
        token = sample.answer[done % len(sample.answer)]
        if done >= max(len(sample.answer), params.min_tokens) and not (params.ignore_eos or self.forever):
            token, output.finish_reason = self.eos_token_ids[0], FinishReason.EOS
        elif token in params.stop_token_ids and done >= params.min_tokens:
            output.finish_reason = FinishReason.STOP
        elif done + 1 == params.max_tokens or len(request.prompt_token_ids) + done + 1 >= self.max_total_tokens:
            output.finish_reason = FinishReason.LENGTH
        output.token_ids = [token]
        if params.logprobs is not None:
            top = [(token + k) % self.vocab_size for k in range(params.logprobs)]
            values = [-0.25 - k for k in range(params.logprobs)]
            output.logprobs = [TokenLogprobs(-0.25, -0.125, top, values, [value / 2 for value in values])]
        if params.prompt_logprobs is not None and done == sample.index == 0:
            output.prompt_logprobs = self._prompt_logprobs(request.prompt_token_ids, params.prompt_logprobs)
        sample.num_output_tokens += 1
        return output

    def _prompt_logprobs(self, prompt: tuple[int, ...], num_top: int) -> PromptLogprobs:
        """Each token is the most likely one, at -0.25, and the ids after it follow."""
        raw = np.full(len(prompt) - 1, -0.25, np.float32)
        behind = np.arange(num_top, dtype=np.int32)[None, :]
        top = (np.array(prompt[1:], np.int32)[:, None] + behind) % self.vocab_size
        return PromptLogprobs(raw, np.ones(len(raw), np.int32), top, raw[:, None] - behind.astype(np.float32))


if __name__ == "__main__":
    import json

    from jaxserve.config import EngineOptions, HostOptions, ModelOptions, ServerOptions

    options = json.loads(os.environ.get("ENGINE_DOUBLE", "{}"))

    def build(model: ModelOptions, engine: EngineOptions, replica: int) -> EngineDouble:
        if "startup_error" in options:
            raise StartupError(options["startup_error"])
        return EngineDouble(**options)

    if sys.argv[1] == "serve":
        from jaxserve.launcher import launch

        sections = json.loads(sys.argv[2])
        sys.exit(
            launch(
                ModelOptions(**sections.get("model", {})),
                EngineOptions(**sections.get("engine", {})),
                ServerOptions(**sections.get("server", {})),
                engine_command=(sys.executable, __file__),
                hosts=HostOptions(**{"num_hosts": 1, **sections.get("hosts", {})}),
            )
        )
    from jaxserve.launcher.engine_process import main

    sys.exit(main(sys.argv[1:], build))
