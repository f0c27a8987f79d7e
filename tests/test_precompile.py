"""`jaxserve compile`: a start after it compiles nothing."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

# Both in one process for the time they take to start; what the process still has in memory must not hide a miss.
SCRIPT = """
import sys
from jaxserve import cli
flags = ["--model-id", sys.argv[1], "--compilation-cache-dir", sys.argv[2], "--max-batch-size", "1", "--max-batch-prefill-tokens", "32"]
assert cli.main(["compile", *flags]) == 0
import jax
from jax import monitoring
from jaxserve.config import EngineOptions, ModelOptions
from jaxserve.engine import build_engine
jax.clear_caches()
events = {}
monitoring.register_event_listener(lambda event, **_: events.update({event: events.get(event, 0) + 1}))
options = EngineOptions(compilation_cache_dir=sys.argv[2], max_batch_size=1, max_batch_prefill_tokens=32)
build_engine(ModelOptions(sys.argv[1]), options)
print("start:", events.get("/jax/compilation_cache/cache_misses", 0), events.get("/jaxserve/executables/found", 0))
"""


def test_a_start_after_it_compiles_nothing(tiny_checkpoint: Callable[[str], Path], tmp_path: Path):
    command = [sys.executable, "-c", SCRIPT, str(tiny_checkpoint("llama")), str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.returncode == 0, done.stderr
    told = re.search(r"jaxserve compile: (\d+) programs compiled, 0 were there already, [\d.]+ s, (\S+)", done.stdout)
    start = re.search(r"start: (\d+) (\d+)", done.stdout)
    assert told and start, done.stdout
    assert int(start[1]) == 0 and int(start[2]) >= 7
    assert list((tmp_path / "cache").glob("jit_*")) and not list((tmp_path / "cache").glob("jit_forward*"))  # they are kept once
    assert int(told[1]) >= int(start[2]) and Path(told[2]) == tmp_path / "cache"
    for folder in map((tmp_path / "cache").joinpath, ("executables", "lowered")):
        (listed,) = folder.glob("prepared-*")
        assert set(listed.read_text().split()) == {path.name for path in folder.iterdir()} - {listed.name}
