"""Milliseconds a call of the sampler alone, by what the rows ask for: `python -m benchmarks.sampler [--rows 1 16] [--vocab 49152]`.

Logits are normal with a few likely tokens, as a language model's are. The time is the smallest of many calls, with the copy of the
result to the host; the sampler is compiled once a number of rows. What an option adds to a whole step, benchmarks.sampled_steps says.
"""

import argparse
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.sampled_steps import CASES
from jaxserve.request import SamplingParams
from jaxserve.runner.sampler import find_logprobs, sample
from jaxserve.runner.sampling_rows import RowPacker
from jaxserve.runner.sampling_state import SamplingState, make_sampling_state
from jaxserve.scheduler.sample import sample_seed

# Logits 50 times as flat: truncation among the likeliest tokens alone does not do.
_FLAT = {f"{name}, flat": lambda row, name=name: {**CASES[name](row), "temperature": 50.0} for name in ("top_p 0.5", "typical_p 0.9")}


@partial(jax.jit, donate_argnums=1, static_argnames="logprobs")
def step(logits: jax.Array, state: SamplingState, columns: jax.Array, *, logprobs: bool) -> tuple[jax.Array, SamplingState]:
    sampled, state = sample(logits, state, columns)
    return find_logprobs(logits, logits, state, columns, sampled) if logprobs else sampled, state


def measure(num_rows: int, vocab_size: int, calls: int) -> None:
    """Print one line a case."""
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=2.0, size=(num_rows, vocab_size)).astype(np.float32)
    for row in range(num_rows):
        logits[row, rng.choice(vocab_size, 40, replace=False)] += rng.uniform(4, 10, 40).astype(np.float32)
    on_device = jnp.asarray(logits)
    state = make_sampling_state(num_rows, vocab_size)
    slots = np.arange(num_rows)
    start = time.perf_counter()
    nobody = jnp.asarray(RowPacker(1).pack(slots[:0], slots[:0], slots[:0], slots[:0] > 0, num_rows))
    compiled = [step.lower(on_device, state, nobody, logprobs=logprobs).compile() for logprobs in (False, True)]
    print(f"{num_rows} rows of {vocab_size} tokens; compiled in {time.perf_counter() - start:.2f} s")
    for name, options in {**CASES, **_FLAT}.items():
        packer, wants_logprobs = RowPacker(num_rows), "logprobs" in options(0)
        for slot in map(int, slots):
            params = SamplingParams(**options(slot))  # pyright: ignore[reportArgumentType]
            packer.enter(slot, params, sample_seed(params.seed, slot))
        columns = jnp.asarray(packer.pack(slots, slots + 100, slots + 50, slots >= 0, num_rows))
        times = []
        for _ in range(calls):
            start = time.perf_counter()
            packed, state = compiled[wants_logprobs](on_device, state, columns)
            np.asarray(packed)
            times.append(time.perf_counter() - start)
        print(f"  {name:20} {min(times) * 1e3:7.3f} ms   median {np.median(times) * 1e3:7.3f} ms")


def main() -> None:
    """Measure as the command line asks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16], metavar="R")
    parser.add_argument("--vocab", type=int, default=49152, metavar="V")
    parser.add_argument("--calls", type=int, default=100)
    options = parser.parse_args()
    for num_rows in options.rows:
        measure(num_rows, options.vocab, options.calls)


if __name__ == "__main__":
    main()
