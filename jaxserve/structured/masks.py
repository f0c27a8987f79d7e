"""Matchers, and the masks of what they allow next: packed bits, filled in llguidance's threads without the GIL."""

import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

import numpy as np

from jaxserve.errors import InvalidRequest
from jaxserve.structured.examiner import TOO_MUCH

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# A lexer state takes 1 to 2 KB, so that a matcher takes 64 MB at worst; JSON schemas of agents make do with hundreds.
MAX_LEXER_STATES = 32768
# CPU that one mask may take: steps wait for it, all requests in them. Masks take 1 ms, those of lexers that double each other a second.
MASK_SECONDS = 0.1


class Matcher:
    """Where one text is in its grammar.

    Args:
        inner: llguidance's.
        tokens: the vocabulary that it was compiled for.
    """

    def __init__(self, inner: "LLMatcher", tokens: "LLTokenizer"):
        self.inner = inner
        self.tokens = tokens

    @classmethod
    def compile(cls, tokens: "LLTokenizer", grammar: str) -> Self:
        """A matcher at a grammar's start; with an `error` where there can be none. Raises InvalidRequest where masks take too long."""
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)
        inner = LLMatcher(tokens, grammar, log_level=0, limits=limits)
        if not inner.is_error():
            inner.compute_bitmask()  # some errors show only now: a grammar that no text matches
            again = inner.deep_copy()  # what a step will do
            begun = time.thread_time()
            again.compute_bitmask()
            if time.thread_time() - begun > MASK_SECONDS:
                raise InvalidRequest(TOO_MUCH)
        return cls(inner, tokens)

    @property
    def error(self) -> str:
        """Why it can go no further, "" while it can."""
        return self.inner.get_error() if self.inner.is_error() else ""

    @property
    def eos_token_ids(self) -> Sequence[int]:
        """Tokens that it allows where the text is complete."""
        return self.tokens.eos_tokens

    def copy(self) -> "Matcher":
        """An independent one at the same place; microseconds."""
        return Matcher(self.inner.deep_copy(), self.tokens)

    def consume(self, token_ids: Sequence[int]) -> None:
        """Go on by tokens; `error` is set where the grammar does not allow them."""
        self.inner.consume_tokens(list(token_ids))


class MaskFiller:
    """Fills masks of many matchers at once.

    Args:
        num_threads: None for one a core that this process may use, 32 at most.
    """

    def __init__(self, num_threads: int | None = None):
        from llguidance import LLExecutor

        self._executor: LLExecutor = LLExecutor(num_threads or min(len(os.sched_getaffinity(0)), 32))

    def fill(self, matchers: Sequence[Matcher], vocab_size: int) -> np.ndarray:
        """Compute what each matcher allows next.

        Args:
            matchers: of one vocabulary, each at most once.
            vocab_size: of the model.

        Returns:
            uint32 [matchers, ceil(vocab_size / 32)]: bit t % 32 of word t // 32 is set where token t is allowed. A matcher that is
            complete allows its end-of-sequence tokens alone, and so does one with an error.
        """
        words = -(-max(vocab_size, matchers[0].tokens.vocab_size) // 32)
        masks = np.zeros((len(matchers), words), np.uint32)
        jobs = [(matcher.inner, row) for row, matcher in enumerate(matchers)]
        self._executor.unsafe_compute_mask_ptr(jobs, masks.ctypes.data, words * 4, len(matchers))
        return masks[:, : -(-vocab_size // 32)]
