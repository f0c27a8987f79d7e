"""The process in which grammars are tried first; started by GrammarExaminer.

It reads one question a line on stdin (JSON {"kind", "text"}) and answers each with a line (JSON {"grammars"} or {"error"}).
"""

import json
import resource
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
    """Answer until stdin ends. Argument: seconds of CPU that one grammar may take."""
    limit = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin.buffer:
        used = resource.getrusage(resource.RUSAGE_SELF)
        # The kernel ends a process that passes it, wherever it is.
        resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + 1 + limit, resource.RLIM_INFINITY))
        question = json.loads(line)
        sys.stdout.buffer.write(json.dumps(examine(question["kind"], question["text"])).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
