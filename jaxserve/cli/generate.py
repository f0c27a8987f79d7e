"""`jaxserve generate`: answer a file of prompts with the engine in this process."""

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict

from jaxserve.batch.options import BatchOptions
from jaxserve.cli.flags import Parser, add_flags, parse, read_flags
from jaxserve.config import EngineOptions, ModelOptions

DESCRIPTION = """\
Answer prompts, one a line, in JSON lines, in the order of the input. Killed at any moment, the same command continues where it stopped.

A line is {"prompt": "..."} or {"messages": [...]} with any sampling field and an optional "id", or a line of OpenAI's batch files
({"custom_id", "method", "url", "body"}, answered in OpenAI's shape), or plain text. A line that cannot be served gets an error record.
"""


def run(arguments: Sequence[str]) -> int:
    """Run a batch; what was done is told in one line on stderr."""
    parser = Parser("jaxserve generate", usage="jaxserve generate -i FILE -o FILE [flags]", description=DESCRIPTION)
    add_flags(parser, BatchOptions, "batch", short={"input": "-i", "output": "-o"})
    add_flags(parser, ModelOptions, "model")
    add_flags(parser, EngineOptions, "engine")
    parsed = parse(parser, arguments)
    batch = read_flags(parser, parsed, BatchOptions, {})
    model = read_flags(parser, parsed, ModelOptions, os.environ)
    engine = read_flags(parser, parsed, EngineOptions, os.environ)
    if batch.input == "-" and sys.stdin.isatty():
        parser.error("prompts are awaited on standard input; name a file with -i")
    from jaxserve.batch.run import run_batch
    from jaxserve.llm import LLM

    summary = run_batch(batch, asdict(model), lambda: LLM(**asdict(model), **asdict(engine)))
    rate = f", {summary.output_tokens / summary.seconds:.0f} tok/s" if summary.seconds else ""
    resumed = f"{summary.resumed} were there before, " if summary.resumed else ""
    print(
        f"jaxserve generate: {resumed}{summary.answered} answered, {summary.refused} refused, {summary.output_tokens} tokens{rate}",
        file=sys.stderr,
    )
    return 0
