"""What a step of the host costs more where http processes are told which pages an engine holds.

    python -m benchmarks.page_changes [--streams 256] [--steps 400]

A scheduler without a device: `decode` is so many streams, a token each a step; `prefill` is steps of 8192 tokens of prompts into a cache
that is full, so that each stores 512 pages and evicts as many. Each in turns with 0, 1 and 2 watchers: CPU microseconds a step of schedule,
update and telling, which the engine's thread does; and beside it those of making and serializing the messages, which is the event loop's.
The least of the rounds, as JSON, with what the index of an http process takes of memory for a page.
"""

import argparse
import gc
import json
import platform
import time
import tracemalloc
from collections.abc import Callable, Sequence

import numpy as np

from jaxserve.page_changes import PageChanges
from jaxserve.page_key import short_names
from jaxserve.request import Request, SamplingParams
from jaxserve.rpc import engine_pb2 as pb
from jaxserve.rpc.prefix_index import PrefixIndex
from jaxserve.rpc.untold_pages import UntoldPages
from jaxserve.scheduler import KVGroupPages, ScheduledBatch, Scheduler, SchedulerConfig
from jaxserve.step import StepResult

PAGE_SIZE = 16
ROUNDS = 5
STEP_TOKENS = 8192


class Watcher(UntoldPages):
    """A stream that nobody reads but this benchmark."""

    def put_pages(self, changes: Sequence[PageChanges]) -> None:
        self.put(changes)

    def write(self) -> int:
        """Make the next message; returns its bytes."""
        return len(pb.EngineMessage(page_changes=self.take()).SerializeToString())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--steps", type=int, default=400)
    arguments = parser.parse_args()
    kinds: dict[str, Callable[[int], tuple[float, float, float]]] = {
        "decode": lambda watchers: decode(watchers, arguments.streams, arguments.steps),
        "prefill": lambda watchers: prefill(watchers, arguments.steps // 8),
    }
    for kind, measure in kinds.items():
        rounds = [{watchers: measure(watchers) for watchers in (0, 1, 2)} for _ in range(ROUNDS)]
        for watchers in (0, 1, 2):
            thread, loop, size = (min(each[watchers][part] for each in rounds) for part in range(3))
            row = {"kind": kind, "watchers": watchers, "engine_thread_us": round(thread, 1), "event_loop_us": round(loop, 1)}
            print(json.dumps({**row, "message_bytes": round(size)}))
    print(json.dumps({"index_bytes_a_page": round(index_bytes()), "python": platform.python_version()}))


def decode(num_watchers: int, streams: int, steps: int) -> tuple[float, float, float]:
    """Microseconds a step of the engine's thread and of the event loop, and bytes of a message."""
    scheduler = Scheduler(SchedulerConfig(streams, STEP_TOKENS, PAGE_SIZE, 4096), [KVGroupPages(60_000)])
    for number in range(streams):
        prompt = np.random.default_rng(number).integers(1, 1000, 32 + number % PAGE_SIZE).tolist()
        scheduler.add(Request(f"{number}", tuple(prompt), SamplingParams(max_tokens=steps + 99)), time.monotonic())
    return run(scheduler, num_watchers, steps)


def prefill(num_watchers: int, steps: int) -> tuple[float, float, float]:
    """The same of steps that compute prompts of 1024 tokens and do nothing else."""
    scheduler = Scheduler(SchedulerConfig(256, STEP_TOKENS, PAGE_SIZE, 4096), [KVGroupPages(2048)])
    tokens = np.random.default_rng(0).integers(1, 1000, (steps + 10, 8, 1024)).tolist()
    for i, batch in enumerate(tokens):
        for j, prompt in enumerate(batch):
            scheduler.add(Request(f"{i}-{j}", tuple(prompt), SamplingParams(max_tokens=1)), time.monotonic())
    return run(scheduler, num_watchers, steps)


def run(scheduler: Scheduler, num_watchers: int, steps: int) -> tuple[float, float, float]:
    watchers = [Watcher() for _ in range(num_watchers)]
    for watcher in watchers:
        scheduler.page_watchers.add(watcher)
    for _ in range(8):  # prompts, and a full cache
        step(scheduler)
    for watcher in watchers:
        watcher.write()
    in_thread = in_loop = 0
    size = 0
    gc.collect()
    gc.disable()
    for _ in range(steps):
        begin = time.thread_time_ns()
        step(scheduler)
        middle = time.thread_time_ns()
        size += sum(watcher.write() for watcher in watchers)
        in_loop += time.thread_time_ns() - middle
        in_thread += middle - begin
    gc.enable()
    return in_thread / steps / 1000, in_loop / steps / 1000, size / steps / max(num_watchers, 1)


def step(scheduler: Scheduler) -> None:
    batch = scheduler.schedule()
    assert batch is not None
    scheduler.update(batch, result_of(batch))
    scheduler.page_watchers.tell()


def result_of(batch: ScheduledBatch) -> StepResult:
    counts = np.array([row.samples for row in batch.rows], np.int32)
    return StepResult(np.full((len(batch.rows), 1), 7, np.int32), counts)


def index_bytes() -> float:
    count = 2**17
    names = short_names(np.random.default_rng(number).bytes(32) for number in range(1000))
    tracemalloc.start()
    index = PrefixIndex()
    for begin in range(0, count, 2048):  # as they come: new objects, message by message
        index.change(0, [(names[n % 1000] + n) % 2**64 for n in range(begin, begin + 2048)], ())
    bytes_now, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return bytes_now / len(index)


if __name__ == "__main__":
    main()
