"""`jaxserve compile`: fill the folder of compiled programs, for images and first starts."""

import os
from collections.abc import Sequence

from jaxserve.cli.flags import Parser
from jaxserve.cli.serve import add_all_flags, read_options
from jaxserve.hosts.placement import place
from jaxserve.launcher.logs import set_up_logging

DESCRIPTION = """\
Compile what a server with the same flags would, and keep it in --compilation-cache-dir: that server then starts without compiling.
The model's weights are neither fetched nor read; the device must be the one that will serve.
Of the server's flags only those of its log have an effect.
"""


def run(arguments: Sequence[str]) -> int:
    """Compile; how far it is is told in the log, what was done in one line on stdout."""
    parser = Parser("jaxserve compile", usage="jaxserve compile [flags of jaxserve serve]", description=DESCRIPTION)
    add_all_flags(parser)
    environment = dict(os.environ)
    model, engine, server, hosts = read_options(arguments, environment, parser)
    set_up_logging(server.json_output, server.log_level)
    placement = place(engine, hosts)
    if placement.span > 1:
        parser.error("a replica over several hosts is compiled at its start, by the first of them for all")
    from jaxserve.launcher.devices import device_environment

    # The devices that the server's first replica will see.
    os.environ.update(environment | device_environment(engine, 0, environment, count=len(placement.replicas)))
    from jaxserve.engine.precompile import precompile

    done = precompile(model, engine)
    print(
        f"jaxserve compile: {done.num_compiled} programs compiled, {done.num_found} were there already, {done.seconds:.1f} s, {done.folder}"
    )
    return 0
