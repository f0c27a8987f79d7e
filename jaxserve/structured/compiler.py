"""GrammarCompiler: grammars to matchers, in threads of its own, with a bounded memory of what it compiled."""

import queue
import threading
from collections import OrderedDict
from concurrent.futures import Future
from typing import TYPE_CHECKING

from jaxserve.errors import InvalidRequest
from jaxserve.grammar import Grammar
from jaxserve.structured.examiner import GrammarExaminer
from jaxserve.structured.masks import Matcher

if TYPE_CHECKING:
    from llguidance import LLTokenizer

NUM_THREADS = 2
# llguidance recurses; the examiner's child has 8 MiB, so that what passes there never overflows here.
STACK_BYTES = 64 * 2**20
MAX_CACHED = 256
MAX_CACHED_BYTES = 8 * 2**20  # of grammars' text; what is compiled of it may take ten times as much
MAX_MESSAGE = 300


class GrammarCompiler:
    """Compiles each grammar once; errors are remembered too. Used by one thread.

    Args:
        tokens: the model's vocabulary (read_tokens).
    """

    def __init__(self, tokens: "LLTokenizer"):
        self._tokens = tokens
        self._cache: OrderedDict[Grammar, Future[Matcher]] = OrderedDict()
        self._cached_bytes = 0
        self._jobs: queue.SimpleQueue[tuple[Grammar, Future[Matcher]] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def compile(self, grammar: Grammar) -> Future[Matcher]:
        """Start compiling, or find what was compiled before.

        Returns:
            a matcher to be copied, at the grammar's start; or InvalidRequest, which says why there is none.
        """
        if (known := self._cache.get(grammar)) is not None:
            self._cache.move_to_end(grammar)
            return known
        future: Future[Matcher] = Future()
        self._cache[grammar] = future
        self._cached_bytes += len(grammar.text)
        while len(self._cache) > MAX_CACHED or self._cached_bytes > MAX_CACHED_BYTES:
            oldest, _ = self._cache.popitem(last=False)
            self._cached_bytes -= len(oldest.text)
        if not self._threads:
            self._start()
        self._jobs.put((grammar, future))
        return future

    def cancel(self, grammar: Grammar, future: Future[Matcher]) -> None:
        """Nobody wants what compile() returned any more: unless its compilation has begun, it is left out."""
        if future.cancel() and self._cache.get(grammar) is future:
            del self._cache[grammar]
            self._cached_bytes -= len(grammar.text)

    def close(self) -> None:
        """Let the threads end; they finish what they are at."""
        for _ in self._threads:
            self._jobs.put(None)
        self._threads.clear()

    def _start(self) -> None:
        before = threading.stack_size(STACK_BYTES)
        try:
            # Daemons: nothing that they do is worth waiting for at the process's end.
            self._threads = [threading.Thread(target=self._work, name=f"grammar-{i}", daemon=True) for i in range(NUM_THREADS)]
            for thread in self._threads:
                thread.start()
        finally:
            threading.stack_size(before)

    def _work(self) -> None:
        examiner = GrammarExaminer()
        while (job := self._jobs.get()) is not None:
            grammar, future = job
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(self._compiled(grammar, examiner))
            except Exception as error:  # whatever it is, only this grammar's requests may end by it
                future.set_exception(InvalidRequest(_one_line(str(error))))
        examiner.close()

    def _compiled(self, grammar: Grammar, examiner: GrammarExaminer) -> Matcher:
        matcher = None
        for text in examiner.examine(grammar):
            matcher = Matcher.compile(self._tokens, text)
            if not matcher.error:
                return matcher
        raise InvalidRequest(matcher.error if matcher is not None else "it is empty")


def _one_line(message: str) -> str:
    line = " ".join(message.split())
    return line if len(line) <= MAX_MESSAGE else line[:MAX_MESSAGE] + "..."
