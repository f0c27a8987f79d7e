"""`jaxserve` and `jaxserve serve`: read the flags, hand them to the launcher."""

import importlib.util
import os
from collections.abc import Sequence

from jaxserve.cli import COMMANDS
from jaxserve.cli.flags import Parser, add_flags, parse, read_flags
from jaxserve.cli.platforms import apply_platforms
from jaxserve.cli.tgi import add_tgi_flags, apply_strict_limits, apply_tgi_flags
from jaxserve.config import EngineOptions, HostOptions, ModelOptions, ServerOptions, parse_mesh
from jaxserve.environment import describe_environment, versions
from jaxserve.errors import StartupError
from jaxserve.hosts.discovery import discover

DESCRIPTION = """\
Serve a language model over HTTP, with OpenAI's and TGI's APIs. Without --model-id: the demo model.

Every flag has an environment variable, its name in upper case: --max-batch-size is MAX_BATCH_SIZE. A flag goes before its variable.
HOSTNAME counts only where it is an IP address, because shells and containers set it to the machine's name.
"""


def read_options(
    arguments: Sequence[str], environment: dict[str, str], parser: Parser | None = None
) -> tuple[ModelOptions, EngineOptions, ServerOptions, HostOptions]:
    """Options from flags and environment.

    Args:
        arguments: after the command's name.
        environment: of this process; --huggingface-hub-cache and platforms' variables change it.
        parser: of another command with the same flags (`add_all_flags`).

    Raises:
        SystemExit: 0 after --help, --version and --env; 2 after a line on stderr for anything wrong.
    """
    parser = parser or _parser()
    parsed = parse(parser, arguments)
    try:
        apply_platforms(environment)
    except StartupError as error:
        parser.error(str(error))
    if hasattr(parsed, "env"):
        print("\n".join(f"{name}: {value}" for name, value in describe_environment().items()), flush=True)
        if set(vars(parsed)) == {"env"} and not environment.get("MODEL_ID"):
            parser.exit(0)
    apply_tgi_flags(parser, parsed, environment)
    if read_flags(parser, parsed, ServerOptions, environment).tgi_strict:
        apply_strict_limits(parsed, environment)
    model = read_flags(parser, parsed, ModelOptions, environment)
    engine = read_flags(parser, parsed, EngineOptions, environment)
    server = read_flags(parser, parsed, ServerOptions, environment)
    _check_together(parser, model, engine)
    if server.otlp_endpoint is not None and importlib.util.find_spec("opentelemetry.exporter.otlp") is None:
        parser.error("--otlp-endpoint needs OpenTelemetry's packages: pip install jaxserve[otlp]")
    try:
        hosts = discover(read_flags(parser, parsed, HostOptions, environment), engine, environment)
    except StartupError as error:
        parser.error(str(error))
    return model, engine, server, hosts


def run(arguments: Sequence[str]) -> int:
    """Serve until told to stop.

    Returns:
        the launcher's exit code.
    """
    environment = dict(os.environ)  # read and changed as a whole before anything of this process or its children sees it
    model, engine, server, hosts = read_options(arguments, environment)
    os.environ.update(environment)
    from jaxserve.launcher import launch  # late: --help and a wrong flag answer at once

    return launch(model, engine, server, hosts=hosts)


def _parser() -> Parser:
    commands = "\n".join(f"  {name:<12}{text}" for name, text in COMMANDS.items())
    parser = Parser(
        "jaxserve",
        usage="jaxserve [serve] [flags]\n       jaxserve {generate,bench,chat,compile} --help",
        description=DESCRIPTION,
        epilog=f"commands:\n{commands}",
    )
    parser.add_argument(
        "--version", "-V", action="version", version=f"jaxserve {versions().get('jaxserve', 'unknown')}", help="Show the version."
    )
    told = "Show versions and devices, for bug reports, and serve if anything else is said."
    parser.add_argument("-e", "--env", action="store_const", const=True, help=told)
    add_all_flags(parser)
    return parser


def add_all_flags(parser: Parser) -> None:
    """Every option of the server, and TGI's spellings."""
    add_flags(parser, ModelOptions, "model")
    add_flags(parser, EngineOptions, "engine")
    add_flags(parser, HostOptions, "hosts (docs/multi_host.md)")
    add_flags(parser, ServerOptions, "server", short={"port": "-p", "graceful_termination_timeout": "-g"})
    add_tgi_flags(parser)


def _check_together(parser: Parser, model: ModelOptions, engine: EngineOptions) -> None:
    if (model.rope_scaling is None) != (model.rope_factor is None):
        parser.error("--rope-scaling and --rope-factor need each other")
    try:
        parse_mesh(engine.mesh)
    except StartupError as error:
        parser.error(str(error))
    if engine.max_input_tokens and engine.max_total_tokens and engine.max_input_tokens >= engine.max_total_tokens:
        parser.error(f"--max-input-tokens ({engine.max_input_tokens}) must be less than --max-total-tokens ({engine.max_total_tokens})")
