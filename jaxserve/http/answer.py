"""Answer: the tokens of one generation as text, sample by sample."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from jaxserve.errors import JaxserveError
from jaxserve.metrics import RequestMeter, RequestTimes
from jaxserve.request import FinishReason, PromptLogprobs, TokenLogprobs, TokenOutput
from jaxserve.rpc.client import Generation
from jaxserve.tokenizer import TextStream, Tokenizer

MERGED_AHEAD = 4


@dataclass(slots=True)
class Sample:
    """One sample on its way.

    Attributes:
        index: which of its request's samples.
        choice: which of the HTTP request's choices.
        text: detokenizes it.
        num_tokens: output tokens so far.
        finish_reason: why it ended; None while it goes on.
        stop: the stop string that ended it.
    """

    index: int
    choice: int
    text: TextStream
    num_tokens: int = 0
    finish_reason: FinishReason | None = None
    stop: str | None = None


@dataclass(slots=True)
class SampleToken:
    """What one token adds to a sample.

    Attributes:
        sample: which.
        token_id: the token; -1 where the sample ended without one.
        text: what the client sees of it: nothing for half a character or what may become a stop string, more for what completes one.
        piece: the token's own text, with keep_pieces.
        logprobs: where the request asked for them.
        finish_reason: on the sample's last token.
    """

    sample: Sample
    token_id: int
    text: str
    piece: str
    logprobs: TokenLogprobs | None
    finish_reason: FinishReason | None


@dataclass(slots=True)
class SampleResult:
    """All of one sample."""

    sample: Sample
    text: str = ""
    tokens: list[SampleToken] = field(default_factory=list)


class Answer:
    """Reads a generation as text; a stop string ends its sample in the engine too.

    Args:
        generation: from rpc.
        tokenizer: the model's.
        meter: measures the request.
        first_choice: number of the first sample among the HTTP request's choices.
        keep_pieces: fill SampleToken.piece.
    """

    def __init__(self, generation: Generation, tokenizer: Tokenizer, meter: RequestMeter, first_choice: int = 0, keep_pieces: bool = False):
        request = generation.request
        self.request = request
        self.meter = meter
        self.times = RequestTimes()  # once all samples have ended
        self.prompt_logprobs: PromptLogprobs | None = None  # once the first token has come, where asked for
        self.samples = [
            Sample(index, first_choice + index, TextStream(tokenizer, request.params, request.prompt_token_ids, keep_pieces))
            for index in range(request.params.n)
        ]
        self._generation = generation
        self.error = ""  # why it failed
        self.dropped = False  # whether its client gave it up
        self._num_unfinished = len(self.samples)
        self._over = False

    async def read(self) -> list[SampleToken]:
        """Wait for new tokens; none once all samples have ended or the answer was aborted.

        Raises:
            Overloaded, InvalidRequest, EngineUnavailable: the engine did not accept the request.
            GenerationFailed: it cannot be finished.
        """
        tokens: list[SampleToken] = []
        while not tokens:
            try:
                outputs = await self._generation.read()
            except JaxserveError as error:
                self._over = True
                self.error = str(error)
                self.meter.failed()
                raise
            if not outputs:
                break
            now = time.perf_counter()
            for output in outputs:
                sample = self.samples[output.index]
                if output.prompt_logprobs is not None:
                    self.prompt_logprobs = output.prompt_logprobs
                if sample.finish_reason is None:
                    self.meter.output(output, now)
                    self._take(sample, output, tokens)
        return tokens

    async def collect(self) -> list[SampleResult]:
        """Wait for the end; raises as read()."""
        results = [SampleResult(sample) for sample in self.samples]
        while tokens := await self.read():
            for token in tokens:
                result = results[token.sample.index]
                result.text += token.text
                result.tokens.append(token)
        return results

    def abort(self) -> None:
        """Give up what still runs; nothing where the answer has ended."""
        if not self._over:
            self._over = self.dropped = True
            self.meter.dropped()
        self._generation.abort()

    def _take(self, sample: Sample, output: TokenOutput, tokens: list[SampleToken]) -> None:
        token_ids, reason = output.token_ids, output.finish_reason
        if not token_ids:
            delta = sample.text.push((), reason)
            tokens.append(SampleToken(sample, -1, delta.text, "", None, reason))
        last = len(token_ids) - 1
        for place, token_id in enumerate(token_ids):
            ends = reason if place == last else None
            delta = sample.text.push((token_id,), ends)
            sample.num_tokens += 1
            if delta.stop is not None:
                ends, sample.stop = FinishReason.STOP, delta.stop
            logprobs = output.logprobs[place] if output.logprobs else None
            tokens.append(SampleToken(sample, token_id, delta.text, delta.pieces[0] if delta.pieces else "", logprobs, ends))
            if delta.stop is not None:
                self._generation.abort(sample.index)
                reason = ends
                break
        if reason is not None:
            self._end(sample, reason)

    def _end(self, sample: Sample, reason: FinishReason) -> None:
        sample.finish_reason = reason
        self.meter.sample_ended(reason, sample.num_tokens)
        self._num_unfinished -= 1
        if not self._num_unfinished:
            self._over = True
            self.times = self.meter.succeeded()


class Answers:
    """The answers of one HTTP request, read as one; choices come in no particular order."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self._merged: asyncio.Queue[list[SampleToken] | Exception] | None = None
        self._readers: list[asyncio.Task[None]] = []
        self._num_reading = 0

    def add(self, answer: Answer) -> None:
        """Add one more, before anything is read."""
        self.answers.append(answer)
        self._num_reading += 1

    @property
    def samples(self) -> list[Sample]:
        """All samples, by choice."""
        return [sample for answer in self.answers for sample in answer.samples]

    @property
    def num_output_tokens(self) -> int:
        """Output tokens so far."""
        return sum(sample.num_tokens for sample in self.samples)

    async def read(self) -> list[SampleToken]:
        """Wait for new tokens of any answer; none once all have ended. Raises as Answer.read()."""
        if len(self.answers) == 1:
            return await self.answers[0].read()
        if self._merged is None:
            self._merged = asyncio.Queue(MERGED_AHEAD)
            self._readers = [asyncio.create_task(self._read(answer, self._merged)) for answer in self.answers]
        while self._num_reading > 0:
            tokens = await self._merged.get()
            if isinstance(tokens, Exception):
                raise tokens
            if tokens:
                return tokens
            self._num_reading -= 1
        return []

    async def collect(self) -> list[SampleResult]:
        """Wait for the end of all; raises as Answer.read() when the first fails."""
        collected = await asyncio.gather(*(answer.collect() for answer in self.answers))
        return [result for results in collected for result in results]

    def abort(self) -> None:
        """Give up what still runs."""
        for answer in self.answers:
            answer.abort()
        for reader in self._readers:
            reader.cancel()
        self._num_reading = 0
        if self._merged is not None and self._merged.empty():
            self._merged.put_nowait([])

    async def _read(self, answer: Answer, merged: asyncio.Queue[list[SampleToken] | Exception]) -> None:
        try:
            while tokens := await answer.read():
                await merged.put(tokens)
            await merged.put([])
        except Exception as error:  # raised by whoever reads the merged answers
            await merged.put(error)


@asynccontextmanager
async def aborted_on_disconnect(receive: Callable[[], Awaitable[Any]], answers: Answers) -> AsyncIterator[None]:
    """Abort the answers when the client hangs up, and whatever still runs on leaving."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        answers.abort()

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()
        answers.abort()
