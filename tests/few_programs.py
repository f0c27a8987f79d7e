"""The few programs that real engine processes of several tests have: compiled once a session, by `jaxserve compile`."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

OPTIONS: dict[str, Any] = dict(max_batch_size=1, max_batch_prefill_tokens=32, max_total_tokens=240, disable_grammar_support=True)
"""Of the engine; eight programs."""

# Both in one process for the time they take to start; what the process still has in memory must not hide a miss.
SCRIPT = """
import json, sys
from pathlib import Path
from jaxserve import cli
model, folder, options = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
flags = [word for name, value in options.items() for word in ["--" + name.replace("_", "-"), str(value)][: 1 if value is True else 2]]
assert cli.main(["compile", "--model-id", model, "--compilation-cache-dir", str(folder), *flags]) == 0
import jax
from jax import monitoring
from jaxserve.config import EngineOptions, ModelOptions
from jaxserve.engine import build_engine
jax.clear_caches()
events = {}
monitoring.register_event_listener(lambda event, **_: events.update({event: events.get(event, 0) + 1}))
build_engine(ModelOptions(model), EngineOptions(compilation_cache_dir=str(folder), **options))
print()
print(json.dumps({
    "missed": events.get("/jax/compilation_cache/cache_misses", 0),
    "found": events.get("/jaxserve/executables/found", 0),
    "files": [path.name for path in folder.iterdir()],
    "kept": {name: [path.name for path in (folder / name).iterdir()] for name in ("executables", "lowered")},
    "listed": [path.read_text().split() for name in ("executables", "lowered") for path in (folder / name).glob("prepared-*")],
}))
"""


class Precompiled(NamedTuple):
    """What `jaxserve compile` left.

    Attributes:
        folder: the compilation cache.
        compiled: what the command printed.
        logged: what it and the start told on the way.
        start: what a start after it found there.
    """

    folder: Path
    compiled: str
    logged: str
    start: dict[str, Any]


def precompile(model: Path, folder: Path) -> Precompiled:
    """Run `jaxserve compile`, and start an engine with the same options.

    Raises:
        AssertionError: one of both failed.
    """
    command = [sys.executable, "-c", SCRIPT, str(model), str(folder), json.dumps(OPTIONS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.returncode == 0, done.stderr
    *compiled, start = done.stdout.splitlines()
    return Precompiled(folder, "\n".join(compiled), done.stderr, json.loads(start))
