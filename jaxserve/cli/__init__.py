"""The command line: argv -> options -> processes. Each command is a module with a `run(arguments) -> exit code`."""

import importlib
import os
import sys
from collections.abc import Sequence

from jaxserve.errors import JaxserveError

COMMANDS = {
    "serve": "serve a model over HTTP (the default: the word may be left out)",
    "generate": "answer a file of prompts, resumably",
    "bench": "measure throughput, latency or a running server",
    "chat": "chat with a running server in the terminal",
    "compile": "compile a model's programs ahead of its first start",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: without the program's name; None for the process's own.

    Returns:
        the exit code: 0, 1 for a failure told in one line on stderr, 2 for wrong usage, 130 after ctrl-c.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = arguments.pop(0) if arguments and arguments[0] in COMMANDS else "serve"
    try:
        try:
            return importlib.import_module(f"jaxserve.cli.{command}").run(arguments)
        finally:
            sys.stdout.flush()
    except JaxserveError as error:
        print(f"jaxserve: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read the output has enough (`| head`); the interpreter must not find the broken pipe again when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
