"""Every bucket filled to its edge, greedy and with every sampling option: what memory that takes, and whether the first time is slower."""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxserve.engine import Engine
from jaxserve.request import MAX_TOP_LOGPROBS, FinishReason, Request, SamplingParams
from jaxserve.runner import RunnerConfig
from jaxserve.runner.buckets import Bucket, Buckets

MOST_OPTIONS: dict[str, Any] = dict(
    temperature=0.8,
    top_p=0.95,
    top_k=50,
    min_p=0.01,
    typical_p=0.98,
    repetition_penalty=1.1,
    presence_penalty=0.1,
    frequency_penalty=0.1,
    logit_bias={token: 1.0 for token in range(64)},
    logprobs=MAX_TOP_LOGPROBS,
)
GREEDY: dict[str, Any] = dict(temperature=0.0)
SLOWER, SLOWER_SECONDS = 2.0, 0.02  # a first time may take so many times the second, and is not worth a word below these seconds


class Edges:
    """Drives an engine that serves nothing else.

    Args:
        config, buckets: of its runner.
    """

    def __init__(self, engine: Engine, config: RunnerConfig, buckets: Buckets):
        self._engine = engine
        self._config = config
        self._buckets = buckets
        self._rng = np.random.default_rng(0)
        self._number = 0

    def reachable(self) -> tuple[list[Bucket], list[Bucket]]:
        """The buckets that some batch takes, and those that none does."""
        reached = [bucket for bucket in self._buckets if self._buckets.pick(*self._edge(bucket)) == bucket]
        return reached, [bucket for bucket in self._buckets if bucket not in reached]

    def drive(self, bucket: Bucket, options: dict[str, Any]) -> float:
        """Seconds of a batch that fills a bucket, to its first tokens; then two tokens more."""
        num_tokens, num_rows = self._edge(bucket)
        longest = self._engine.info.max_total_tokens - 3
        lengths = np.full(num_rows, num_tokens // num_rows)
        lengths[: num_tokens % num_rows] += 1
        return self._run([min(int(length), longest) for length in lengths], 3, options)

    def fill(self) -> float:
        """Seconds of more long requests than the KV cache holds, all at once: it is filled, and requests are preempted."""
        info = self._engine.info
        most = info.max_total_tokens // info.page_size
        # As many as run at once, of whole pages, short enough that they grow while they run.
        pages = min(max(most // 2, info.num_pages // self._config.max_batch_size), most - 4)
        fitting = max(info.num_pages // pages, 1)
        pages = min(info.num_pages // fitting - 1, most - 4)  # little is left for them to grow into: decoding to the end of it is slow
        grown = (info.num_pages - fitting * pages) // fitting + 3
        return self._run([pages * info.page_size] * (fitting + 2), min(grown, most - pages) * info.page_size, MOST_OPTIONS)

    @staticmethod
    def _edge(bucket: Bucket) -> tuple[int, int]:
        """(tokens, rows) of the largest batch; where each row had one token it would be a decode-only step."""
        if bucket.decode_only:
            return bucket.num_tokens, bucket.num_rows
        return bucket.num_tokens, max(min(bucket.num_rows, bucket.num_tokens - 1), 1)

    def _run(self, lengths: list[int], max_tokens: int, options: dict[str, Any]) -> float:
        begin, first = time.perf_counter(), 0.0
        for length in lengths:
            self._number += 1
            params = SamplingParams(**options, max_tokens=max_tokens, ignore_eos=True, seed=self._number)
            prompt = self._rng.integers(3, min(49000, self._engine.info.vocab_size), length)
            self._engine.add_request(Request(f"edge-{self._number}", tuple(prompt.tolist()), params))
        begin = time.perf_counter()
        while self._engine.has_work:
            for output in self._engine.step():
                first = first or time.perf_counter()
                if output.finish_reason is FinishReason.ERROR:
                    raise RuntimeError(output.error)
        return first - begin


def check_edges(engine: Engine, config: RunnerConfig, buckets: Buckets, fill: bool, say: Callable[[str], None] = print) -> bool:
    """Fill every bucket, twice in each way; with `fill` also the whole KV cache.

    Returns:
        whether nothing was compiled. An allocation that fails raises.
    """
    edges = Edges(engine, config, buckets)
    compiled = engine.stats().compile_events
    reached, never = edges.reachable()
    slow = []
    for bucket in reached:
        for name, options in (("greedy", GREEDY), ("all options", MOST_OPTIONS)):
            first, second = edges.drive(bucket, options), edges.drive(bucket, options)
            if first > SLOWER * second and first > SLOWER_SECONDS:
                slow.append(f"{bucket.num_tokens} tokens of {bucket.num_rows} rows, {name}: {first:.3f} s, then {second:.3f} s")
    if fill:
        say(f"edges: the KV cache filled, first token after {edges.fill():.1f} s, {engine.stats().num_preemptions} preemptions")
    engine.check_integrity()
    stats = engine.stats()
    compiled = stats.compile_events - compiled
    say(f"edges: {len(reached)} buckets filled, {compiled} compile events")
    if never:
        say(f"edges: no batch takes these (tokens, rows): {[(bucket.num_tokens, bucket.num_rows) for bucket in never]}")
    for line in slow:
        say(f"edges: the first time is slower: {line}")
    memory = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in memory:
        peak, limit = (memory[name] / 2**30 for name in ("peak_bytes_in_use", "bytes_limit"))
        say(f"edges: at most {peak:.2f} of {limit:.2f} GiB were in use")
    return compiled == 0
