"""`jaxserve chat`: chat with a running server in the terminal."""

from collections.abc import Sequence

from jaxserve.chat import HELP, ChatOptions, run_chat
from jaxserve.cli.flags import Parser, add_flags, parse, read_flags


def run(arguments: Sequence[str]) -> int:
    """Chat until the user leaves."""
    parser = Parser("jaxserve chat", description=f"Chat with a running server. {HELP} A piped input is one turn a line.")
    add_flags(parser, ChatOptions, "chat")
    return run_chat(read_flags(parser, parse(parser, arguments), ChatOptions, {}))
