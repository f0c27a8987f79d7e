"""The whole engine on one model shape: decode step by batch size, prefill throughput, host time a step, start to ready.

    python -m benchmarks.engine FOLDER [--batch-sizes 1 64] [--max-batch-tokens 8192] [--dtype bfloat16]

FOLDER holds a config.json and a tokenizer; the weights are random. A decode step is (time of [1024 in, 257 out] - time of [1024 in, 1 out])
/ 256 with all requests sent at once; prompts are uniform token ids, greedy, `ignore_eos`, prefix cache off. One JSON line a figure.
"""

import argparse
import json
import random
import time

from jaxserve import LLM, SamplingParams

IN, OUT = 1024, 257
PREFILLS = ((64, 2048), (8, 8192))


def say(**figures: object) -> None:
    """Print one line."""
    print(json.dumps(figures), flush=True)


class Workload:
    """Random prompts, new ones for every run."""

    def __init__(self, llm: LLM):
        self._llm = llm
        self._random = random.Random(0)

    def seconds(self, count: int, tokens_in: int, tokens_out: int) -> float:
        """Wall time of `count` requests sent at once."""
        prompts = [[self._random.randrange(3, 49000) for _ in range(tokens_in)] for _ in range(count)]
        params = SamplingParams(temperature=0.0, max_tokens=tokens_out, ignore_eos=True)
        begin = time.perf_counter()
        outputs = self._llm.generate(prompts, params)
        seconds = time.perf_counter() - begin
        tokens = {token for output in outputs for token in output.outputs[0].token_ids}
        assert tokens_out == 1 or len(tokens) > 1, "constant logits: the run is void"
        return seconds


def main() -> None:
    """Read the arguments and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--max-batch-tokens", type=int, default=8192)
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args()
    begin = time.perf_counter()
    llm = LLM(
        args.folder,
        load_format="dummy",
        dtype=args.dtype,
        prefix_caching=False,
        max_batch_size=max(args.batch_sizes),
        max_total_tokens=9000,
        max_batch_prefill_tokens=args.max_batch_tokens,
    )
    say(ready_s=round(time.perf_counter() - begin, 1), device=llm.info.device, dtype=llm.info.dtype, pages=llm.info.num_pages)
    workload = Workload(llm)
    for size in args.batch_sizes:
        workload.seconds(size, 64, 4)
        first = workload.seconds(size, IN, 1)
        say(batch_size=size, decode_step_ms=round((workload.seconds(size, IN, OUT) - first) / (OUT - 1) * 1000, 3))
    for count, length in PREFILLS:
        say(prefill=f"{count} x {length}", tok_s=round(count * length / workload.seconds(count, length, 1)))
    stats = llm.engines[0].stats()
    milliseconds = {
        name: round(getattr(stats, f"{name}_seconds") / stats.num_steps * 1000, 3) for name in ("schedule", "dispatch", "collect")
    }
    say(steps=stats.num_steps, compile_events=stats.compile_events, host_ms_a_step=milliseconds)


if __name__ == "__main__":
    main()
