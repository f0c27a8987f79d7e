"""Service: what every route needs to turn a request into answers."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxserve.config import ServerOptions
from jaxserve.errors import EngineUnavailable, InvalidRequest, Overloaded
from jaxserve.http.answer import Answer, Answers
from jaxserve.http.conversation import ChatFormat, Conversation
from jaxserve.http.errors import ModelNotServed
from jaxserve.http.request_record import note_answers
from jaxserve.http.turn import Turn
from jaxserve.metrics import Metrics, RequestMeter
from jaxserve.request import EngineInfo, Request, SamplingParams
from jaxserve.rpc.router import Router
from jaxserve.tokenizer import Tokenizer, import_transformers, load_tokenizer

logger = logging.getLogger(__name__)

READY_POLL_INTERVAL = 0.02  # seconds
# Texts that may wait for a tokenizer thread; beyond, requests are refused.
MAX_PENDING_TEXTS = 512
# A text with more characters leaves the other threads to shorter ones.
LONG_TEXT = 65536
MAX_STOP_CHARACTERS = 1000
# Sent where no model was chosen: by TGI's users, and by huggingface_hub's InferenceClient.
PLACEHOLDER_NAMES = ("tgi", "dummy")


class Service:
    """The engines, the tokenizer and the limits of one http process.

    Args:
        router: to the engines.
        metrics: where requests are counted.
        options: limits and names.
        tokenizer_config_path: a tokenizer_config.json whose chat template replaces the model's.
        max_concurrent_requests: of an engine, for /info.
        model_file: where an engine tells the path of its model before it is ready, if it does.
    """

    def __init__(
        self,
        router: Router,
        metrics: Metrics,
        options: ServerOptions,
        tokenizer_config_path: str | None = None,
        max_concurrent_requests: int = 0,
        model_file: Path | None = None,
    ):
        self.router = router
        self.metrics = metrics
        self.options = options
        self.max_concurrent_requests = max_concurrent_requests
        self.started_at = int(time.time())
        self._open = False
        self._tokenizer: Tokenizer | None = None
        self._chat_format: ChatFormat | None = None
        self._tokenizer_config_path = tokenizer_config_path
        self._model_file = model_file
        self._threads = ThreadPoolExecutor(options.validation_workers, thread_name_prefix="tokenizer")
        self._num_pending_texts = 0
        self._long_text = asyncio.Semaphore(1)

    async def load_tokenizer(self) -> None:
        """Wait for an engine to tell which model it serves, and load its tokenizer.

        Raises:
            StartupError: it cannot be loaded.
        """
        loop, begin = asyncio.get_running_loop(), time.monotonic()
        await loop.run_in_executor(self._threads, import_transformers)
        logger.info("transformers is imported after %.1f s", time.monotonic() - begin)
        while (path := self._model_path()) is None:
            await asyncio.sleep(READY_POLL_INTERVAL)
        tokenizer = await loop.run_in_executor(self._threads, load_tokenizer, path, self._tokenizer_config_path)
        self._chat_format = ChatFormat(tokenizer, self.options.tool_call_parser, self.options.reasoning_parser)
        self._tokenizer = tokenizer
        logger.info("the tokenizer is loaded after %.1f s", time.monotonic() - begin)

    async def open(self) -> None:
        """Wait until an engine is there; from then on requests are answered. The tokenizer must be loaded."""
        while not self.router.available:
            await asyncio.sleep(READY_POLL_INTERVAL)
        self._open = True

    def _model_path(self) -> Path | None:
        """Of the folder or file that the engines read, once it is known."""
        if self._model_file is not None and self._model_file.exists():
            return Path(self._model_file.read_text())
        # An engine of another host tells none.
        return Path(path) if self.router.available and (path := self.info.model_path) else None

    @property
    def ready(self) -> bool:
        """Whether requests can be answered now."""
        return self._open and self.router.available

    @property
    def info(self) -> EngineInfo:
        """What the engines have in common. Raises EngineUnavailable while the model loads."""
        return self.router.info

    @property
    def model_name(self) -> str:
        """The name in answers."""
        return self.options.served_model_name or self.info.model_id

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's. Raises EngineUnavailable while the model loads."""
        if self._tokenizer is None:
            raise EngineUnavailable("the model is still loading")
        return self._tokenizer

    @property
    def chat_format(self) -> ChatFormat:
        """How the model is asked and how it answers. Raises EngineUnavailable while the model loads."""
        if self._chat_format is None:
            raise EngineUnavailable("the model is still loading")
        return self._chat_format

    def check_model(self, name: str | None) -> None:
        """Raise ModelNotServed unless it is a name of the model served here. TGI takes any other for an adapter, and one that it has not
        for the model itself."""
        if name and not self.options.tgi_strict and name not in (self.model_name, self.info.model_id, *PLACEHOLDER_NAMES):
            raise ModelNotServed(name)

    def check_stop(self, stop: Sequence[str]) -> None:
        """Raise InvalidRequest for too many or too long stop strings."""
        if len(stop) > self.options.max_stop_sequences:
            raise InvalidRequest(f"`stop` supports up to {self.options.max_stop_sequences} stop sequences. Given: {len(stop)}", "stop")
        if any(len(text) > MAX_STOP_CHARACTERS for text in stop):
            raise InvalidRequest(f"`stop` supports stop sequences of up to {MAX_STOP_CHARACTERS} characters", "stop")

    async def encode(self, text: str, add_special_tokens: bool = True, limited: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
            limited: refuse a prompt that is too long; where this can be told of its characters it is not tokenized.

        Raises:
            InvalidRequest: the text cannot be tokenized.
            ContextTooLong: it has more tokens than a prompt may have.
            Overloaded: too many texts wait already.
        """
        limit = self.info.max_input_tokens if limited else None
        return await self.in_thread(self.tokenizer.encode, text, add_special_tokens, limit, size=len(text))

    async def render(self, conversation: Conversation, limited: bool = True) -> tuple[str, list[int]]:
        """Text and token ids of a conversation, by the model's chat template.

        Args:
            limited: as in `encode`.

        Raises:
            InvalidRequest: the template refuses it.
            ContextTooLong: it has more tokens than a prompt may have.
            Overloaded: too many texts wait already.
        """
        size = sum(len(content) for message in conversation.messages if isinstance(content := message.get("content"), str))
        limit = self.info.max_input_tokens if limited else None
        return await self.in_thread(self.chat_format.render, conversation, limit, size=size)

    async def turn(
        self,
        request_id: str,
        conversation: Conversation,
        arrived: float,
        *,
        cache_salt: str = "",
        add_special_tokens: bool = False,
        truncate: Callable[[list[int]], list[int]] | None = None,
    ) -> Turn:
        """Send a conversation to the engines.

        Args:
            request_id, arrived, cache_salt: as in `answers`.
            add_special_tokens: add what the tokenizer adds around a text to what the chat template renders.
            truncate: shortens the prompt's token ids.

        Raises:
            As `render` and `answers`.
        """
        conversation.params.validate(self.info.vocab_size)
        prompt, token_ids = await self.render(conversation, limited=truncate is None)
        if add_special_tokens:
            token_ids = await self.encode(prompt, True, limited=truncate is None)
        if truncate is not None:
            token_ids = truncate(token_ids)
        answer_format, params = self.chat_format.answer_format(conversation, prompt)
        answers = self.answers(request_id, [(token_ids, params)], arrived, cache_salt=cache_salt)
        return Turn(answers, answer_format, prompt)

    async def in_thread[T](self, work: Callable[..., T], *arguments: Any, size: int = 0) -> T:
        """Run tokenizer work in one of the few threads for it; of long texts (`size` in characters) one at a time."""
        if self._num_pending_texts >= MAX_PENDING_TEXTS:
            raise Overloaded
        self._num_pending_texts += 1
        try:
            async with self._long_text if size > LONG_TEXT else nullcontext():
                return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)
        finally:
            self._num_pending_texts -= 1

    def answers(
        self,
        request_id: str,
        prompts: Sequence[tuple[Sequence[int], SamplingParams]],
        arrived: float,
        *,
        cache_salt: str = "",
        keep_pieces: bool = False,
    ) -> Answers:
        """Validate prompts and send them to the engines.

        Args:
            request_id: unique; where there are several prompts, each gets its number behind it.
            prompts: token ids and how to go on with them; max_tokens None is filled in with what the context leaves.
            arrived: time.perf_counter() when the HTTP request came in.
            keep_pieces: the text of each token will be shown.

        Raises:
            InvalidRequest, ContextTooLong: naming what is wrong; nothing was sent.
            EngineUnavailable: no engine can be asked.
        """
        requests = [
            Request(f"{request_id}-{number}" if number else request_id, tuple(token_ids), self._filled_in(params, token_ids), cache_salt)
            for number, (token_ids, params) in enumerate(prompts)
        ]
        for request in requests:
            request.validate(self.info)
        answers = Answers()
        try:
            for request in requests:
                meter = RequestMeter(self.metrics, arrived, request)
                answers.add(Answer(self.router.submit(request), self.tokenizer, meter, len(answers.samples), keep_pieces))
        except BaseException:
            answers.abort()
            raise
        note_answers(answers.answers)
        return answers

    def _filled_in(self, params: SamplingParams, token_ids: Sequence[int]) -> SamplingParams:
        if params.max_tokens is not None:
            return params
        return replace(params, max_tokens=max(self.info.max_total_tokens - len(token_ids), 1))

    def close(self) -> None:
        """Let the threads go."""
        self._threads.shutdown(wait=False, cancel_futures=True)
