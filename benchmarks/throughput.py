"""Output tokens a second of one engine with more requests than it has room for, all there from the beginning.

    python -m benchmarks.throughput FOLDER [--quantize fp8] [--tokens-in 1000] [--tokens-out 1000] [--requests 2000] [--seconds 240]

FOLDER holds a config.json and a tokenizer; the weights are random. Prompts are token ids uniform in 3..48999, each another one; greedy,
`ignore_eos`, no prefix cache, `max_total_tokens` what a request needs. The run ends with the last request, or at --seconds with the tokens
that there are by then; the clock begins with the first request. The engine alone is measured: no HTTP, and no text is made of the tokens.

The row is called [FORMAT_]IN_OUT_tok_s, with --label in front of the lengths where it is given.
"""

import argparse
import itertools
import random
import time
from pathlib import Path

from benchmarks.quantized_model import CHOICES, quantized_model
from benchmarks.rows import add_row_flags, command_line, make_rows
from jaxserve import LLM, SamplingParams
from jaxserve.engine import Engine
from jaxserve.request import Request

VERBS = ("schedule", "dispatch", "device", "collect")
TELL = 10.0  # seconds between two lines of progress


class Run:
    """Requests through an engine, counted.

    Args:
        tokens_in, tokens_out: of each request.
    """

    def __init__(self, engine: Engine, tokens_in: int, tokens_out: int):
        self._engine = engine
        self._in = tokens_in
        self._params = SamplingParams(temperature=0.0, max_tokens=tokens_out, ignore_eos=True)
        self._random = random.Random(0)
        self._largest_id = min(49000, engine.info.vocab_size)
        self._numbers = itertools.count()

    def measure(self, requests: int, most_seconds: float) -> tuple[int, float]:
        """(output tokens, seconds) of so many requests, or of what there was time for; the others are aborted."""
        prompts = [tuple(self._random.randrange(3, self._largest_id) for _ in range(self._in)) for _ in range(requests)]
        names = [f"throughput-{next(self._numbers)}" for _ in range(requests)]
        seen: set[int] = set()
        begin = told = time.perf_counter()
        for name, prompt in zip(names, prompts, strict=True):
            self._engine.add_request(Request(name, prompt, self._params))
        tokens, seconds = 0, 0.0
        while self._engine.has_work and (seconds := time.perf_counter() - begin) < most_seconds:
            for output in self._engine.step():
                tokens += len(output.token_ids)
                seen.update(output.token_ids)
                if output.error:
                    raise SystemExit(f"a request failed: {output.error}")
            if time.perf_counter() - told >= TELL:
                told = time.perf_counter()
                stats = self._engine.stats()
                state = f"{stats.num_running} running, {stats.num_waiting} waiting, {stats.num_pages_used}/{stats.num_pages} pages"
                print(f"{told - begin:6.1f} s: {tokens:,} tokens, {state}, {stats.num_preemptions} preemptions", flush=True)
        seconds = time.perf_counter() - begin
        assert tokens <= 1 or len(seen) > 1, "constant logits: the run is void"
        for name in names:
            self._engine.abort(name)
        while self._engine.has_work:
            self._engine.step()
        return tokens, seconds


def row_name(quantize: str | None, label: str, tokens_in: int, tokens_out: int) -> str:
    """Of the figure."""
    return "_".join(filter(None, (quantize, label, str(tokens_in), str(tokens_out), "tok_s")))


def main() -> None:
    """Read the arguments and measure."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quantize", choices=CHOICES, help="random weights in this format")
    parser.add_argument("--kv-cache-dtype", help="the engine's flag")
    parser.add_argument("--label", default="", help="part of the row's name")
    parser.add_argument("--tokens-in", type=int, default=1000)
    parser.add_argument("--tokens-out", type=int, default=1000)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=240.0, help="most of them")
    parser.add_argument("--max-batch-size", type=int, help="the engine's flag: requests that run at once")
    parser.add_argument("--max-batch-prefill-tokens", type=int, help="the engine's flag")
    parser.add_argument("--no-grammars", action="store_true", help="compile nothing for grammars: a quicker start")
    add_row_flags(parser)
    arguments = parser.parse_args()
    given = {name: getattr(arguments, name) for name in ("kv_cache_dtype", "max_batch_size", "max_batch_prefill_tokens")}
    options = {name: value for name, value in given.items() if value is not None}
    options |= dict(prefix_caching=False, max_total_tokens=arguments.tokens_in + arguments.tokens_out)
    options["disable_grammar_support"] = arguments.no_grammars
    begin = time.perf_counter()
    with quantized_model(arguments.folder, arguments.quantize) as (folder, weights):
        llm = LLM(str(folder), **weights, **options)
    engine, info = llm.engines[0], llm.info
    fitting = info.num_pages * info.page_size // info.max_total_tokens
    print(f"ready after {time.perf_counter() - begin:.1f} s on {info.device}; the cache holds {fitting} whole requests", flush=True)
    run = Run(engine, arguments.tokens_in, arguments.tokens_out)
    run.measure(2, 2.0)
    before = engine.stats()
    tokens, seconds = run.measure(arguments.requests, arguments.seconds)
    stats = engine.stats()
    steps = stats.num_steps - before.num_steps
    milliseconds = {verb: (getattr(stats, f"{verb}_seconds") - getattr(before, f"{verb}_seconds")) / steps * 1000 for verb in VERBS}
    padded, useful = stats.padded_tokens - before.padded_tokens, stats.useful_tokens - before.useful_tokens
    print(f"{tokens:,} tokens in {seconds:.1f} s, {steps} steps; ms a step: {', '.join(f'{v} {ms:.2f}' for v, ms in milliseconds.items())}")
    share = padded / (padded + useful)
    print(f"{stats.num_preemptions} preemptions, {stats.compile_events} compile events, {share:.1%} of the tokens were padding")
    rows = make_rows(arguments, info.device)
    name = row_name(arguments.quantize, arguments.label, arguments.tokens_in, arguments.tokens_out)
    rows.add(name, tokens / seconds, "tok/s", command_line("benchmarks.throughput"))
    rows.show()
    if stats.compile_events:
        raise SystemExit("something was compiled after ready")


if __name__ == "__main__":
    main()
