"""The process in which grammars are tried first; started by GrammarExaminer.

It reads one question a line on stdin (JSON {"kind", "text", "seconds"}, the last of CPU time that it may take) and answers each with a line
(JSON {"grammars"} or {"error"}).
"""

import json
import resource
import signal
import sys

from llguidance import LLMatcher

from jaxserve.errors import InvalidRequest
from jaxserve.grammar import Grammar, GrammarKind
from jaxserve.structured.translation import translate

MEMORY_BYTES = 2 * 2**30


def examine(kind: str, text: str) -> dict[str, object]:
    """The child's answer to one question."""
    try:
        grammars = translate(Grammar(GrammarKind(kind), text))
    except InvalidRequest as error:
        return {"error": str(error)}
    results = [LLMatcher.validate_grammar_with_warnings(grammar) for grammar in grammars]
    valid = [grammar for grammar, (fails, _) in zip(grammars, results, strict=True) if not fails]
    return {"grammars": valid} if valid else {"error": results[-1][1][0]}


def main() -> None:
    """Answer until stdin ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin.buffer:
        question = json.loads(line)
        # SIGPROF ends the process, wherever it is: Python handles it no more than llguidance does.
        signal.setitimer(signal.ITIMER_PROF, question["seconds"])
        answer = examine(question["kind"], question["text"])
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
