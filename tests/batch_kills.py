"""Run as a program: a batch is killed with SIGKILL over and over, at random moments, until it is done.

Usage: batch_kills.py INPUT OUTPUT KILLS. A process of its own that forks, because the tests' process has threads of JAX's.
"""

import os
import random
import signal
import sys
import time

from llm_double import LLMDouble

from jaxserve.batch.options import BatchOptions
from jaxserve.batch.run import run_batch


def main(source: str, output: str, kills: int) -> None:
    """Run, kill, run again; the last run is left alone."""
    rng = random.Random(7)
    for attempt in range(kills + 1):
        child = os.fork()
        if child == 0:
            summary = run_batch(BatchOptions(input=source, output=output), {}, lambda: LLMDouble(delay=0.001))  # type: ignore[arg-type, return-value]
            print(summary.resumed, summary.answered, flush=True)
            os._exit(0)
        if attempt < kills:
            time.sleep(rng.uniform(0.005, 0.06))
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
