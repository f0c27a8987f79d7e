"""LLM: engines for scripts, without HTTP; the same scheduler, runner and sampler as the server's.

One replica runs in this process. Several run in a process each, as a server's do, so that none waits for another one's host.
"""

import itertools
import weakref
from collections.abc import Generator, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Protocol, Self

from tqdm import tqdm

from jaxserve.config import EngineOptions, ModelOptions, check
from jaxserve.errors import GenerationFailed, InvalidRequest, StartupError
from jaxserve.launcher.replicas import Replicas
from jaxserve.request import (
    EngineInfo,
    EngineStats,
    FinishReason,
    PromptLogprobs,
    Request,
    SamplingParams,
    TokenLogprobs,
    TokenOutput,
)
from jaxserve.tokenizer import TextStream, Tokenizer, load_tokenizer
from jaxserve.weights import resolve_model

if TYPE_CHECKING:
    from jaxserve.engine import Engine

Prompt = str | Sequence[int]
Messages = Sequence[dict[str, Any]]

# Requests handed to an engine beyond its slots, so that a slot that falls free is filled in the next step.
QUEUED_PER_ENGINE = 8


@dataclass(slots=True)
class SampleOutput:
    """One continuation of a prompt.

    Attributes:
        index: which of the n samples.
        text: the detokenized continuation, cut at a stop string.
        token_ids: every output token, the one that ended the sample included.
        finish_reason: why it ended; None while it runs.
        logprobs: one entry a token where SamplingParams.logprobs asked for them.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)


@dataclass(slots=True)
class RequestOutput:
    """A prompt and its continuations.

    Attributes:
        prompt: the text, None where token ids were given.
        prompt_token_ids: what the model saw.
        outputs: n samples, by index.
        num_cached_tokens: prompt tokens taken from the prefix cache by the first sample.
        prompt_logprobs: where SamplingParams.prompt_logprobs asked for them.
    """

    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: list[SampleOutput]
    num_cached_tokens: int = 0
    prompt_logprobs: PromptLogprobs | None = None


class Asked(Protocol):
    """What is needed of the engines, whichever process they run in."""

    info: EngineInfo

    def submit(self, request: Request) -> None:
        """Take a validated request."""
        ...

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Forget a request or one of its samples."""
        ...

    def read(self) -> list[TokenOutput]:
        """New outputs of what was submitted. Raises GenerationFailed."""
        ...

    def stats(self) -> list[EngineStats]:
        """Counters by replica."""
        ...

    def close(self) -> None:
        """End."""
        ...


class InThisProcess:
    """One engine, stepped by whoever reads."""

    def __init__(self, engine: "Engine"):
        self.info = engine.info
        self.submit = engine.add_request
        self.abort = engine.abort
        self.close = engine.close
        self._engine = engine

    def read(self) -> list[TokenOutput]:
        """Step once."""
        return self._engine.step() if self._engine.has_work else []

    def stats(self) -> list[EngineStats]:
        """Counters as of now."""
        return [self._engine.stats()]


class LLM:
    """A model ready to generate. A context manager: leaving it ends the engines, as does close() and the end of the process.

    Args:
        model_id: hub id, local folder or .gguf file; None for the demo model.
        options: any field of config.ModelOptions and config.EngineOptions, e.g. mesh="1x2", revision="main", max_batch_size=8.

    Attributes:
        tokenizer: the model's.
        info: limits and names.
        engines: those in this process: one, or none where the mesh has several replicas.

    Raises:
        StartupError: the model cannot be served; the message says why in one line.
    """

    def __init__(self, model_id: str | None = None, **options: Any):
        model_fields = {f.name for f in fields(ModelOptions)}
        engine_fields = {f.name for f in fields(EngineOptions)}
        if unknown := set(options) - model_fields - engine_fields:
            raise StartupError(f"unknown options: {', '.join(sorted(unknown))}")
        model_options = ModelOptions(model_id=model_id, **{k: v for k, v in options.items() if k in model_fields})
        engine_options = EngineOptions(**{k: v for k, v in options.items() if k in engine_fields})
        check(model_options)
        check(engine_options)
        source = resolve_model(model_options)
        self.tokenizer: Tokenizer = load_tokenizer(source.path, model_options.tokenizer_config_path)
        self.engines: list[Engine] = []
        self._asked: Asked
        if engine_options.data_size > 1:
            self._asked = Replicas(model_options, engine_options)
            weakref.finalize(self, self._asked.close)
        else:
            from jaxserve.engine import build_engine  # late: it imports jax, which replicas need in their own processes only

            self.engines.append(build_engine(model_options, engine_options, source=source, tokenizer=self.tokenizer))
            self._asked = InThisProcess(self.engines[0])
        self.info = self._asked.info
        self._num_replicas = engine_options.data_size
        self._max_batch_size = engine_options.max_batch_size or 256
        self._request_numbers = itertools.count()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the engines. May be called again."""
        self._asked.close()

    def stats(self) -> list[EngineStats]:
        """Counters of each replica; up to a second old where there are several."""
        return self._asked.stats()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Continue prompts.

        Args:
            prompts: a text, a list of token ids, or a list of either.
            sampling_params: for all prompts, or one each; None for the model's defaults.
            use_tqdm: show a progress bar on stderr.

        Returns:
            one output a prompt, in the order given.

        Raises:
            InvalidRequest: a prompt or parameter cannot be served; nothing was generated.
            GenerationFailed: a step failed, or a replica ended; the message says which and how.
        """
        batch = _as_prompts(prompts)
        params = self._as_params(sampling_params, len(batch))
        requests = [self._request(prompt, p) for prompt, p in zip(batch, params, strict=True)]
        outputs: list[RequestOutput | None] = [None] * len(batch)
        items = ((i, prompt, request) for i, (prompt, request) in enumerate(zip(batch, requests, strict=True)))
        for index, output in tqdm(self._run(items), total=len(batch), disable=not use_tqdm):
            if isinstance(output, InvalidRequest):  # a grammar that cannot be compiled
                raise output
            outputs[index] = output
        return [output for output in outputs if output is not None]

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
        **template_options: Any,
    ) -> list[RequestOutput]:
        """Answer conversations; each is rendered with the model's chat template.

        Args:
            messages: one conversation ({"role", "content"} dicts), or several.
            sampling_params, use_tqdm: as for generate().
            template_options: passed to the chat template, e.g. add_generation_prompt=False.

        Raises:
            InvalidRequest: as generate(), or the template refuses the messages.
        """
        conversations = [messages] if messages and isinstance(messages[0], dict) else messages
        # The first element tells which of both was given: no type checker sees that.
        prompts = [self.tokenizer.apply_chat_template(list(c), **template_options)[1] for c in conversations]  # type: ignore[arg-type]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def stream[Key: Hashable](
        self, items: Iterable[tuple[Key, Prompt, SamplingParams]]
    ) -> Generator[tuple[Key, RequestOutput | InvalidRequest]]:
        """Continue prompts as they come, pulling the next only when it can run soon.

        Yields:
            (key, output) in order of completion; (key, error) where a prompt or its parameters cannot be served.
        """

        def prepared() -> Iterator[tuple[Key, Prompt, Request | InvalidRequest]]:
            for key, prompt, params in items:
                try:
                    yield key, prompt, self._request(prompt, params)
                except InvalidRequest as error:
                    yield key, prompt, error

        return self._run(prepared())

    def _request(self, prompt: Prompt, params: SamplingParams) -> Request:
        token_ids = tuple(self.tokenizer.encode(prompt)) if isinstance(prompt, str) else tuple(prompt)
        request = Request(f"llm-{next(self._request_numbers)}", token_ids, params)
        request.validate(self.info)
        return request

    def _as_params(self, given: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
        if given is None:
            given = SamplingParams(**self.info.defaults)  # type: ignore[arg-type]  checked by who read them
        if isinstance(given, SamplingParams):
            return [given] * count
        if len(given) != count:
            raise InvalidRequest(f"{count} prompts but {len(given)} sampling params", "sampling_params")
        return list(given)

    def _run(self, items: Iterable[tuple[Any, Prompt, Request | InvalidRequest]]) -> Generator[tuple[Any, Any]]:
        """Feed the engines from the items and yield what finishes; on close, whatever still runs is aborted."""
        source = iter(items)
        running: dict[str, _Running] = {}
        exhausted = False
        try:
            while running or not exhausted:
                while not exhausted and len(running) < self._num_replicas * (self._max_batch_size + QUEUED_PER_ENGINE):
                    key, prompt, request = next(source, (None, "", None))
                    if request is None:
                        exhausted = True
                    elif isinstance(request, InvalidRequest):
                        yield key, request
                    else:
                        self._asked.submit(request)
                        running[request.request_id] = _Running(key, self._asked, prompt, request, self.tokenizer)
                for output in self._asked.read() if running else ():
                    if (state := running.get(output.request_id)) is not None and state.take(output):
                        del running[output.request_id]
                        yield state.key, state.error or state.output
        finally:
            for request_id in running:
                self._asked.abort(request_id)


class _Running:
    """A request on its way: collects tokens, detokenizes, and ends samples at their stop strings."""

    def __init__(self, key: Hashable, asked: Asked, prompt: Prompt, request: Request, tokenizer: Tokenizer):
        self.key = key
        self._asked = asked
        self._grammar_param = request.params.grammar.param if request.params.grammar is not None else None
        self.output = RequestOutput(
            prompt if isinstance(prompt, str) else None,
            request.prompt_token_ids,
            [SampleOutput(index) for index in range(request.params.n)],
        )
        self.error: InvalidRequest | None = None
        self._texts = [TextStream(tokenizer, request.params, request.prompt_token_ids) for _ in range(request.params.n)]
        self._unfinished = set(range(request.params.n))

    def take(self, output: TokenOutput) -> bool:
        """Add what a step yielded.

        Returns:
            whether the request has ended.

        Raises:
            GenerationFailed: the step failed.
        """
        if output.index not in self._unfinished:
            return False
        if output.finish_reason is FinishReason.ERROR:
            raise GenerationFailed(output.error)
        if output.finish_reason is FinishReason.INVALID:
            self._asked.abort(output.request_id)
            self.error = InvalidRequest(output.error, self._grammar_param)
            return True
        sample = self.output.outputs[output.index]
        delta = self._texts[output.index].push(output.token_ids, output.finish_reason)
        sample.text += delta.text
        sample.token_ids += output.token_ids[: delta.num_tokens]
        sample.logprobs += output.logprobs[: delta.num_tokens]
        sample.finish_reason = output.finish_reason
        if delta.stop is not None and output.finish_reason is None:
            self._asked.abort(output.request_id, output.index)
            sample.finish_reason = FinishReason.STOP
        self.output.prompt_logprobs = self.output.prompt_logprobs or output.prompt_logprobs
        if output.index == 0:
            self.output.num_cached_tokens = output.num_cached_tokens
        if sample.finish_reason is not None:
            self._unfinished.discard(output.index)
        return not self._unfinished


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt, or several, as a list."""
    if isinstance(prompts, str):
        return [prompts]
    if prompts and isinstance(prompts[0], int):
        return [prompts]  # pyright: ignore[reportReturnType]
    return list(prompts)  # pyright: ignore[reportReturnType]
