"""A GGUF model kept quantized beside the same weights as float32: milliseconds of a decode step through LLM, by requests.

    python -m benchmarks.gguf_decode MODEL.gguf [--requests 1 2 4 8 16] [--rounds 7]

Each side is a process of its own, and they take turns. A step is the time from one step's tokens to the next one's while all requests
decode; a figure is the median over rounds of a round's median, and beside it the least round and the CPU time of the process a step.
With --priority the processes run before all others on the machine while they measure (nice -20; that takes root).
"""

import argparse
import os
import random
import resource
import statistics
import tempfile
import time
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.perplexity import write_dense
from jaxserve import LLM
from jaxserve.request import Request, SamplingParams
from jaxserve.tokenizer import load_pipeline
from jaxserve.weights.gguf_file import GGUFCheckpoint

TOKENS_IN, TOKENS_OUT = 32, 24


def serve(model: str, most: int, priority: bool, pipe: Connection) -> None:
    """One side: for each count of requests that comes, the milliseconds of its steps and the CPU time of one."""
    with LLM(model, max_batch_size=most, cpu_kv_cache_gib=0.25, prefix_caching=False, disable_grammar_support=True) as llm:
        (engine,) = llm.engines
        pipe.send("ready")
        for turn in iter(pipe.recv, None):
            _set_priority(-20 if priority else 0)
            generator = random.Random(turn)
            for i in range(turn):
                prompt = tuple(generator.randrange(3, 40000) for _ in range(TOKENS_IN))
                engine.add_request(Request(str(i), prompt, SamplingParams(max_tokens=TOKENS_OUT, temperature=0.0, ignore_eos=True)))
            steps: list[float] = []
            cpu = 0.0
            while engine.has_work:
                begin, used = time.perf_counter(), _cpu_seconds()
                if len(engine.step()) == turn:
                    steps.append((time.perf_counter() - begin) * 1e3)
                    cpu += _cpu_seconds() - used
            _set_priority(0)
            # The first steps still have prompts in them, the last ones nothing to dispatch.
            pipe.send((statistics.median(steps[2:-2]), cpu / len(steps) * 1e3))


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _set_priority(nice: int) -> None:
    for thread in os.listdir("/proc/self/task"):
        os.setpriority(os.PRIO_PROCESS, int(thread), nice)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--requests", type=int, nargs="*", default=[1, 2, 4, 8, 16])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--priority", action="store_true", help="run before all other processes")
    args = parser.parse_args()
    context = get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        dense = Path(folder) / "dense"
        dense.mkdir()
        pipeline = load_pipeline(args.model)
        assert pipeline is not None, "the file has a tokenizer"
        pipeline.save(str(dense / "tokenizer.json"))
        write_dense(dense, GGUFCheckpoint(args.model))
        sides: dict[str, Connection] = {}
        for name, model in (("float32", dense), ("GGUF", args.model)):
            here, there = context.Pipe()
            context.Process(target=serve, args=(str(model), max(args.requests), args.priority, there), daemon=True).start()
            assert here.recv() == "ready"
            sides[name] = here
        print("requests".ljust(10), *(f"{name}: median (least), CPU".rjust(32) for name in sides))
        for count in args.requests:
            found: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
            for _ in range(args.rounds):
                for name, pipe in sides.items():
                    pipe.send(count)
                    found[name].append(pipe.recv())
            cells = []
            for rounds in found.values():
                walls, cpus = zip(*rounds, strict=True)
                cells.append(f"{statistics.median(walls):.1f} ({min(walls):.1f}), {statistics.median(cpus):.1f}".rjust(32))
            print(str(count).ljust(10), *cells, flush=True)
        for pipe in sides.values():
            pipe.send(None)


if __name__ == "__main__":
    main()
