"""Constraints: the grammars of the samples that run, and what each allows next."""

from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import dataclass, field

import numpy as np

from jaxserve.errors import InvalidRequest
from jaxserve.request import FinishReason, Request, TokenOutput
from jaxserve.scheduler import Sample, ScheduledBatch, ScheduledRow
from jaxserve.structured import Compilation, GrammarCompiler, MaskFiller, Matcher

COMPILE_TIME_LIMIT = 60.0  # seconds, without waiting for others; a grammar takes a few at most


@dataclass(slots=True)
class Progress:
    """A sample's matcher and how many output tokens it has consumed."""

    matcher: Matcher
    num_consumed: int = 0


@dataclass(slots=True)
class Constrained:
    """A constrained request: its compiled grammar, once it is, and its samples that were scheduled and are not finished."""

    request: Request
    compilation: Compilation
    unfinished: set[int]
    progress: dict[int, Progress] = field(default_factory=dict)


class Constraints:
    """Compiles the grammars of requests and fills the masks of their rows. Not thread-safe: the engine's thread owns it.

    A sample's matcher consumes the sample's tokens when the next mask is wanted, so preemption, which keeps the tokens, is nothing to it.

    Args:
        compiler: of the model's vocabulary.
        vocab_size: of the model.
    """

    def __init__(self, compiler: GrammarCompiler, vocab_size: int):
        self._compiler = compiler
        self._filler = MaskFiller()
        self._vocab_size = vocab_size
        self._requests: dict[str, Constrained] = {}
        self._compiling: dict[str, Constrained] = {}

    @property
    def compiling(self) -> bool:
        """Whether a request waits for its grammar."""
        return bool(self._compiling)

    def close(self) -> None:
        """Compile no more."""
        self._compiler.close()

    def add(self, request: Request) -> None:
        """Start compiling the grammar of a request; take_compiled() tells when it is done."""
        assert request.params.grammar is not None
        constrained = Constrained(request, self._compiler.compile(request.params.grammar), set(range(request.params.n)))
        self._requests[request.request_id] = self._compiling[request.request_id] = constrained

    def wait(self, timeout: float) -> None:
        """Wait until a grammar is compiled, or `timeout` seconds."""
        wait([constrained.compilation.future for constrained in self._compiling.values()], timeout, FIRST_COMPLETED)

    def take_compiled(self) -> tuple[list[str], list[TokenOutput]]:
        """Return the ids of requests that may be scheduled now, and the last outputs of those whose grammar cannot be compiled."""
        ready, outputs = [], []
        for request_id, constrained in list(self._compiling.items()):
            if constrained.compilation.future.done():
                error = constrained.compilation.future.exception()
            elif constrained.compilation.own_seconds() > COMPILE_TIME_LIMIT:
                error = InvalidRequest(f"it took longer than {COMPILE_TIME_LIMIT:g} s")
            else:
                continue
            if error is None:
                del self._compiling[request_id]
                ready.append(request_id)
            else:
                outputs += self._refused(constrained, f"the grammar cannot be compiled: {error}")
        return ready, outputs

    def fill(self, batch: ScheduledBatch) -> tuple[np.ndarray, list[TokenOutput]]:
        """Bring the matchers of a batch's rows up to date and compute what may come next.

        Args:
            batch: its samples know all tokens but the one that this batch samples.

        Returns:
            uint32 [rows, ceil(vocabulary / 32)], everything allowed where a row is not constrained; and the last outputs of samples
            that can have no further token: their grammar is complete and they may not end by an end-of-sequence token, or it became
            too complex.
        """
        masks = np.full((len(batch.rows), -(-self._vocab_size // 32)), 0xFFFFFFFF, np.uint32)
        constrained = list(self._constrained_rows(batch))
        if not constrained:
            return masks, []
        for _, row, progress in constrained:
            _consume(progress, row.sample)
        places = [place for place, _, _ in constrained]
        masks[places] = self._filler.fill([progress.matcher for _, _, progress in constrained], self._vocab_size)
        outputs = []
        for place, row, progress in constrained:
            if row.sample.request.request_id in self._requests:  # no sibling was refused before it
                outputs += self._end(row.sample, row.num_output_tokens, progress.matcher, masks[place])
        return masks, outputs

    def forget(self, request_id: str, index: int | None = None) -> None:
        """Drop the matchers of a request, or of one of its samples, that has ended; unknown ids are ignored."""
        if (constrained := self._requests.get(request_id)) is None:
            return
        constrained.unfinished -= constrained.unfinished if index is None else {index}
        if index is not None:
            constrained.progress.pop(index, None)
        if not constrained.unfinished:
            del self._requests[request_id]
            if self._compiling.pop(request_id, None) is not None:
                self._cancel(constrained)

    def _cancel(self, constrained: Constrained) -> None:
        """Spare the compiler the grammar of a request that has ended, unless another one waits for it."""
        if all(other.compilation is not constrained.compilation for other in self._compiling.values()):
            self._compiler.cancel(constrained.compilation)

    def _constrained_rows(self, batch: ScheduledBatch) -> Iterator[tuple[int, ScheduledRow, Progress]]:
        """Rows whose token must obey a grammar, with their places; not those whose sample has ended meanwhile."""
        for place, row in enumerate(batch.rows):
            sample = row.sample
            if not (sample.constrained and row.samples):
                continue
            constrained = self._requests.get(sample.request.request_id)
            if constrained is None or sample.index not in constrained.unfinished:
                continue
            if (progress := constrained.progress.get(sample.index)) is None:
                progress = constrained.progress[sample.index] = Progress(constrained.compilation.future.result().copy())
            yield place, row, progress

    def _end(self, sample: Sample, num_output_tokens: int, matcher: Matcher, mask: np.ndarray) -> list[TokenOutput]:
        """The last outputs of a sample, or of its whole request, if nothing can follow; then what its row samples will be dropped.

        Clears the tokens in its mask that must not end it.
        """
        if error := matcher.error:
            return self._refused(self._requests[sample.request.request_id], f"the grammar cannot be followed any further: {error}")
        early = num_output_tokens < sample.params.min_tokens
        banned = [t for t in matcher.eos_token_ids if early or t not in sample.stop_token_ids]
        if early:
            banned += sample.stop_token_ids
        if not banned:
            return []
        for token in banned:
            if token >> 5 < len(mask):  # a tokenizer may have more tokens than its model
                mask[token >> 5] &= ~np.uint32(1 << (token & 31))
        if mask.any():
            return []
        self.forget(sample.request.request_id, sample.index)
        known = sample.num_cached_tokens, sample.queue_time
        return [TokenOutput(sample.request.request_id, sample.index, [], [], FinishReason.STOP, *known)]

    def _refused(self, constrained: Constrained, reason: str) -> list[TokenOutput]:
        """The last outputs of a request whose grammar is at fault."""
        request = constrained.request
        assert request.params.grammar is not None
        message = f"`{request.params.grammar.param}`: {reason}"
        indices = sorted(constrained.unfinished)
        self.forget(request.request_id)
        return [TokenOutput(request.request_id, index, [], [], FinishReason.INVALID, error=message) for index in indices]


def _consume(progress: Progress, sample: Sample) -> None:
    known: Sequence[int] = sample.token_ids[sample.num_prompt_tokens + progress.num_consumed :]
    if known:
        progress.matcher.consume(known)
        progress.num_consumed += len(known)
