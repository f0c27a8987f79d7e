"""GrammarCompiler: grammars to matchers, in threads of its own, with a bounded memory of what it compiled."""

import threading
import time
from collections import OrderedDict, deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from jaxserve.errors import InvalidRequest
from jaxserve.grammar import Grammar
from jaxserve.structured import examiner as limits
from jaxserve.structured.examiner import GrammarExaminer, TookTooLong
from jaxserve.structured.masks import Matcher

if TYPE_CHECKING:
    from llguidance import LLTokenizer

# llguidance recurses; the examiner's child has 8 MiB, so that what passes there never overflows here.
STACK_BYTES = 64 * 2**20
MAX_CACHED = 256
MAX_CACHED_BYTES = 8 * 2**20  # of grammars' text; what is compiled of it may take ten times as much
MAX_MESSAGE = 300
NO_TEXT = "no text can match it: a `$ref` leads back to itself, or its parts contradict each other"


@dataclass(slots=True, eq=False)
class Compilation:
    """A grammar on its way.

    Attributes:
        future: a matcher to be copied, at the grammar's start; or InvalidRequest, which says why there is none.
        tried_at: time.monotonic() when the try that goes on began; None: it waits for its turn, or is done.
        seconds: that earlier tries took.
    """

    grammar: Grammar
    future: Future[Matcher] = field(default_factory=Future)
    tried_at: float | None = None
    seconds: float = 0.0

    def own_seconds(self) -> float:
        """How long it was worked at so far, without its waiting for others."""
        tried_at = self.tried_at
        return self.seconds + (0.0 if tried_at is None else time.monotonic() - tried_at)


class GrammarCompiler:
    """Compiles each grammar once; errors are remembered too. Used by one thread.

    Nobody waits for long behind another's large grammar: each is first tried for a fraction of a second, in the order in which they
    came. What takes longer goes to a second queue and is tried there to the end. Of the two threads one serves both queues, the first
    queue first, and the other one the first queue alone.

    Args:
        tokens: the model's vocabulary (read_tokens).
    """

    def __init__(self, tokens: "LLTokenizer"):
        self._tokens = tokens
        self._cache: OrderedDict[Grammar, Compilation] = OrderedDict()
        self._cached_bytes = 0
        self._started = False
        self._wake = threading.Condition()
        # Guarded by _wake.
        self._new: deque[Compilation] = deque()
        self._long: deque[Compilation] = deque()
        self._closing = False

    def compile(self, grammar: Grammar) -> Compilation:
        """Start compiling, or find what was compiled before."""
        if (known := self._cache.get(grammar)) is not None:
            self._cache.move_to_end(grammar)
            return known
        compilation = Compilation(grammar)
        self._cache[grammar] = compilation
        self._cached_bytes += len(grammar.text)
        while len(self._cache) > MAX_CACHED or self._cached_bytes > MAX_CACHED_BYTES:
            oldest, _ = self._cache.popitem(last=False)
            self._cached_bytes -= len(oldest.text)
        if not self._started:
            self._start()
        with self._wake:
            self._new.append(compilation)
            self._wake.notify_all()
        return compilation

    def cancel(self, compilation: Compilation) -> None:
        """Nobody wants what compile() returned any more: if it waits in one of the queues, it is left out."""
        with self._wake:
            for waiting in (self._new, self._long):
                if compilation in waiting:
                    waiting.remove(compilation)
                    compilation.future.cancel()
        if compilation.future.cancelled() and self._cache.get(compilation.grammar) is compilation:
            del self._cache[compilation.grammar]
            self._cached_bytes -= len(compilation.grammar.text)

    def close(self) -> None:
        """Compile no more; the threads finish what they are at."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()

    def _start(self) -> None:
        self._started = True
        before = threading.stack_size(STACK_BYTES)
        try:
            for name, takes_long in (("grammar", False), ("long-grammar", True)):
                # Daemons: nothing that they do is worth waiting for at the process's end.
                threading.Thread(target=self._work, args=(takes_long,), name=name, daemon=True).start()
        finally:
            threading.stack_size(before)

    def _work(self, takes_long: bool) -> None:
        examiner = GrammarExaminer()
        while (taken := self._take(takes_long)) is not None:
            compilation, seconds = taken
            try:
                compilation.future.set_result(self._compiled(compilation.grammar, examiner, seconds))
            except TookTooLong as error:
                self._postpone(compilation, error, seconds)
            except Exception as error:  # whatever it is, only this grammar's requests may end by it
                compilation.future.set_exception(InvalidRequest(_one_line(str(error))))
        examiner.close()

    def _take(self, takes_long: bool) -> tuple[Compilation, float] | None:
        """Wait for the next one, and for how many seconds of CPU it is to be tried; None at the end."""
        with self._wake:
            self._wake.wait_for(lambda: self._closing or self._new or (takes_long and self._long))
            if self._closing:
                return None
            compilation, seconds = (
                (self._new.popleft(), limits.FIRST_CPU_SECONDS) if self._new else (self._long.popleft(), limits.CPU_SECONDS)
            )
            compilation.tried_at = time.monotonic()
            return compilation, seconds

    def _postpone(self, compilation: Compilation, error: TookTooLong, seconds: float) -> None:
        if seconds >= limits.CPU_SECONDS:
            compilation.future.set_exception(InvalidRequest(str(error)))
            return
        compilation.seconds, compilation.tried_at = compilation.own_seconds(), None
        with self._wake:
            self._long.append(compilation)
            self._wake.notify_all()

    def _compiled(self, grammar: Grammar, examiner: GrammarExaminer, seconds: float) -> Matcher:
        matcher = None
        for text in examiner.examine(grammar, seconds):
            matcher = Matcher.compile(self._tokens, text)
            if not matcher.error:
                return matcher
        reason = matcher.error if matcher is not None else "it is empty"
        raise InvalidRequest(NO_TEXT if "NoExtension" in reason else reason)


def _one_line(message: str) -> str:
    line = " ".join(message.split())
    return line if len(line) <= MAX_MESSAGE else line[:MAX_MESSAGE] + "..."
