"""How long the engine takes to be ready: cold (empty caches) and warm, each in a process of its own, without HTTP.

`python -m benchmarks.start MODEL [--options JSON]`. Random weights of the model's shape. Prints the
log of each start with seconds since the process was asked for, then one line of figures.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

CHILD = """
import glob, json, logging, os, resource, sys, time
asked = float(sys.argv[2])
logging.basicConfig(level=logging.WARNING, format="%(message)s")
say = lambda *text: print(f"{time.time() - asked:6.1f} s ", *text, flush=True)
class Tell(logging.Handler):
    def emit(self, record):
        say(record.getMessage())
logging.getLogger("jaxserve").setLevel(logging.INFO)
logging.getLogger("jaxserve").addHandler(Tell())
logging.getLogger("jaxserve").propagate = False
say("python")
import jax
say("jax imported")
from jax import monitoring
seconds = {}
def listen(event, duration, **_):
    seconds.setdefault(event.rsplit("/", 1)[-1], []).append(duration)
monitoring.register_event_duration_secs_listener(listen)
from jaxserve.config import EngineOptions, ModelOptions
from jaxserve.engine import build_engine
say("jaxserve imported")
engine = build_engine(ModelOptions(sys.argv[1], load_format="dummy"), EngineOptions(**json.loads(sys.argv[3])))
say("ready")
own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
say(f"  CPU seconds here: {own.ru_utime:.1f} + {own.ru_stime:.1f} of the system")
say(f"  in processes that have ended (lowering, ptxas): {children.ru_utime:.1f} + {children.ru_stime:.1f}")
threads = {}
for task in glob.glob("/proc/self/task/*/stat"):
    name, _, rest = open(task).read().partition("(")[2].rpartition(")")
    ticks = sum(map(int, rest.split()[11:13]))
    threads[name] = threads.get(name, 0) + ticks / os.sysconf("SC_CLK_TCK")
most = sorted(threads.items(), key=lambda item: -item[1])[:6]
say("  of threads that are still there:", ", ".join(f"{name} {s:.1f}" for name, s in most))
for event, values in sorted(seconds.items()):
    if sum(values) > 0.5:
        say(f"  {event}: {len(values)} times, {sum(values):.1f} s, longest {max(values):.1f}")
stats = jax.local_devices()[0].memory_stats() or {}
say("  pages", engine.info.num_pages, "GiB in use", round(stats.get("bytes_in_use", 0) / 2**30, 2))
from jaxserve.request import Request, SamplingParams
for number in range(3):
    begin, first, tokens = time.monotonic(), 0.0, []
    prompt = tuple(range(100 + number, 200 + number))
    engine.add_request(Request(f"r{number}", prompt, SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)))
    while engine.has_work:
        for output in engine.step():
            first = first or time.monotonic() - begin
            tokens += output.token_ids
    say(f"  request {number}: first token after {first * 1e3:.1f} ms, tokens {tokens}")
say("  compile events", engine.stats().compile_events)
engine.close()
"""


def start(model: str, options: dict[str, object]) -> float:
    """Start an engine in a new process.

    Returns:
        seconds until it was ready.
    """
    command = [sys.executable, "-c", CHILD, model, str(time.time()), json.dumps(options)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        ready = 0.0
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if line.split()[2:] == ["ready"]:
                ready = float(line.split()[0])
    if process.returncode:
        raise SystemExit(process.returncode)
    return ready


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--options", type=json.loads, default={}, help="EngineOptions as JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CUDA_CACHE_PATH"] = os.path.join(folder, "cuda")
        options = {"compilation_cache_dir": os.path.join(folder, "xla"), **arguments.options}
        figures = {}
        for name in ("ready_cold_s", "ready_warm_s"):
            print(f"-- {name}", flush=True)
            figures[name] = start(arguments.model, options)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
