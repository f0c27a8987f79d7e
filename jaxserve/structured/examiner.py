"""GrammarExaminer: tries a grammar in a process of its own before the engine compiles it.

Some grammars of a few kilobytes keep llguidance 1.9 busy for ever (terminals that double each other, `allOf` of many patterns), and some
overflow its stack, which would end the whole process. A grammar that does so in the child costs the child.

The child is examination.py. It ends with its stdin, and by itself where a grammar takes too much time or memory.
"""

import contextlib
import json
import select
import signal
import subprocess
import sys
import time

from jaxserve.errors import InvalidRequest
from jaxserve.grammar import Grammar

FIRST_CPU_SECONDS = 0.5  # for one grammar, the first time
CPU_SECONDS = 5.0  # and the second
WALL_SECONDS = 30.0
TOO_MUCH = "it takes too much time, memory or nesting to compile"


class TookTooLong(InvalidRequest):
    """The time given to a grammar was not enough."""


class GrammarExaminer:
    """One child at a time, started when it is first needed and again after it was lost. Not thread-safe."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None

    def examine(self, grammar: Grammar, seconds: float) -> list[str]:
        """Translate a grammar and see that it compiles, but for what depends on the vocabulary.

        Args:
            seconds: of CPU time that it may take.

        Returns:
            llguidance's form of it; where there are several, the first that the vocabulary allows is to be taken.

        Raises:
            TookTooLong: it takes more time than that.
            InvalidRequest: it cannot be compiled, and why.
        """
        if self._child is None:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "jaxserve.structured.examination"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # where a grammar is too much for it, it has much to say
            )
        question = {"kind": grammar.kind.value, "text": grammar.text, "seconds": seconds}
        try:
            answer = self._ask(self._child, json.dumps(question).encode())
        except TimeoutError:
            self.close()
            raise TookTooLong(TOO_MUCH) from None
        if answer is None:
            out_of_time = self._child.wait() == -signal.SIGPROF
            self.close()
            raise (TookTooLong if out_of_time else InvalidRequest)(TOO_MUCH)
        read = json.loads(answer)
        if "error" in read:
            raise InvalidRequest(read["error"])
        return read["grammars"]

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            self._child.kill()
            with self._child:  # closes the pipes and waits
                pass
            self._child = None

    def _ask(self, child: subprocess.Popen[bytes], question: bytes) -> bytes | None:
        """The answer; None where the child has ended. Raises TimeoutError where it says nothing for too long."""
        assert child.stdin is not None and child.stdout is not None
        deadline = time.monotonic() + WALL_SECONDS
        answer = b""
        with contextlib.suppress(BrokenPipeError):
            child.stdin.write(question + b"\n")
            child.stdin.flush()
            while not answer.endswith(b"\n"):
                ready, _, _ = select.select([child.stdout], [], [], max(deadline - time.monotonic(), 0.0))
                if not ready:
                    raise TimeoutError
                part = child.stdout.read1()  # pyright: ignore[reportAttributeAccessIssue]
                if not part:
                    return None
                answer += part
            return answer
        return None
