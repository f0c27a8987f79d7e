"""The whole engine on one model's shape: decode step by batch size, prefill throughput, host time a step.

    python -m benchmarks.engine FOLDER [--label 1b] [--quantize fp8] [--mesh 1x2] [--only decode prefill] [--results FILE]

FOLDER holds a config.json and a tokenizer; the weights are random. The engine runs with its default flags but for three: dummy
weights, no prefix cache, requests of at most 32768 tokens. Prompts are token ids uniform in 3..48999, new ones for every run; greedy,
`ignore_eos`, all requests sent at once. A decode step is (time of [1024 in, 257 out] - time of [1024 in, 1 out]) / 256; it is left out
where the prompts take so many steps (--max-batch-prefill-tokens) that the first requests end before the last begin. Each figure is made
of the medians of the repetitions. A decode figure comes with the host's milliseconds a step, by verb, and with the output tokens a second
of the whole run, prompts included. What sampling adds to a step is benchmarks.sampled_steps' to say: the difference of two such figures,
each with seconds of prefill in it, is off by up to a millisecond.

With --quantize rows are called after the format: fp8_decode_step_b1_ms. w4 and w8 serve the shape as GPTQ checkpoints (4 bits, 8 bits with
zero points, groups of 128), fp8_blocks and mxfp4 as checkpoints in those formats, q4_k_m, q5_k_m, q6_k and q8_0 as GGUF files; the others
are the engine's flag. On a mesh of T devices they begin with tpT and the label: tp2_8b_decode_step_b1_ms.
What jaxserve logs of its start is shown, among it how much the host and each device held while the weights were loaded.
"""

import argparse
import logging
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.quantized_model import CHOICES, quantized_model
from benchmarks.rows import Rows, add_row_flags, command_line, make_rows, mesh_prefix
from jaxserve import LLM, SamplingParams
from jaxserve.config import parse_mesh

MAX_TOTAL_TOKENS = 32768
VERBS = ("schedule", "dispatch", "collect")


class Workload:
    """Random prompts, new ones for every run."""

    def __init__(self, llm: LLM):
        self._llm = llm
        self._random = random.Random(0)
        self._largest_id = min(49000, llm.info.vocab_size)

    def seconds(self, count: int, tokens_in: int, tokens_out: int) -> float:
        """Wall time of `count` greedy requests sent at once."""
        prompts = [[self._random.randrange(3, self._largest_id) for _ in range(tokens_in)] for _ in range(count)]
        params = SamplingParams(temperature=0.0, max_tokens=tokens_out, ignore_eos=True)
        begin = time.perf_counter()
        outputs = self._llm.generate(prompts, params)
        seconds = time.perf_counter() - begin
        tokens = {token for output in outputs for token in output.outputs[0].token_ids}
        # Small random weights make one answer repeat a token, but not answers to several prompts the same.
        assert count == 1 or len(tokens) > 1, "constant logits: the run is void"
        return seconds


class Measurement:
    """The figures of one engine.

    Args:
        prefix: the beginning of the rows' names.
        label: of the shape, part of the rows' names; "" for none.
        tokens_in, tokens_out: of a request of a decode figure.
        repetitions: of each figure.
    """

    def __init__(self, llm: LLM, rows: Rows, prefix: str, label: str, tokens_in: int, tokens_out: int, repetitions: int):
        self._llm = llm
        self._rows = rows
        self._prefix = prefix
        self._label = f"{label}_" if label else ""
        self._in, self._out = tokens_in, tokens_out
        self._repetitions = repetitions
        self._command = command_line("benchmarks.engine")
        self._workload = Workload(llm)

    def decode(self, count: int) -> None:
        """Output tokens a second of `count` requests at once, their prompts' time included; milliseconds of a decode step of so many, which
        is left out where most steps would have fewer that decode.
        """
        whole, milliseconds = self._seconds_and_step_milliseconds(count)
        self._rows.add(f"{self._prefix}output_{self._label}b{count}_tok_s", count * self._out / whole, "tok/s", self._command)
        if milliseconds is not None:
            self._rows.add(f"{self._prefix}decode_step_{self._label}b{count}_ms", milliseconds, "ms", self._command)

    def prefill(self, count: int, length: int) -> None:
        """Prompt tokens a second."""
        self._workload.seconds(min(count, 2), length, 1)
        rate = count * length / self._median(lambda: self._workload.seconds(count, length, 1))
        self._rows.add(f"{self._prefix}prefill_{self._label}{count}x{length}_tok_s", rate, "tok/s", self._command)

    def _seconds_and_step_milliseconds(self, count: int) -> tuple[float, float | None]:
        self._workload.seconds(count, min(64, self._in), 4)
        stats = self._llm.engines[0].stats
        firsts, wholes, prompt_steps, steps, host = [], [], 0, 0, dict.fromkeys(VERBS, 0.0)
        for _ in range(self._repetitions):  # in turn: both with the card as warm
            begin = stats().num_steps
            firsts.append(self._workload.seconds(count, self._in, 1))
            before = stats()
            wholes.append(self._workload.seconds(count, self._in, self._out))
            after = stats()
            prompt_steps += before.num_steps - begin
            steps += after.num_steps - before.num_steps
            host = {verb: seconds + _difference(before, after, f"{verb}_seconds") for verb, seconds in host.items()}
        first, whole = statistics.median(firsts), statistics.median(wholes)
        prompt_steps /= self._repetitions
        if 2 * prompt_steps > self._out:
            print(f"B={count}: left out: prompts take {prompt_steps:.0f} steps, so too few of {self._out - 1} have all decode", flush=True)
            return whole, None
        milliseconds = (whole - first) / (self._out - 1) * 1000
        told = ", ".join(f"{verb} {seconds / steps * 1000:.3f}" for verb, seconds in host.items())
        runs = ", ".join(f"{many:.3f} - {one:.3f}" for many, one in zip(wholes, firsts, strict=True))
        print(f"B={count}: step {milliseconds:.3f} ms (seconds: {runs}); host ms a step: {told}", flush=True)
        return whole, milliseconds

    def _median(self, run: Callable[[], float]) -> float:
        return statistics.median(run() for _ in range(self._repetitions))


def name_parts(quantize: str | None, label: str, tensor_size: int) -> tuple[str, str]:
    """Prefix and label of the rows' names, as Measurement takes them."""
    prefix = f"{quantize}_" if quantize else ""
    if tensor_size == 1:
        return prefix, label
    return mesh_prefix((1, tensor_size), "_".join(filter(None, (quantize, label)))), ""


def main() -> None:
    """Read the arguments and measure."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--label", default="", help="part of the rows' names, for a shape that is not the 8B one: 1b")
    parser.add_argument("--quantize", choices=CHOICES, help="random weights in this format")
    parser.add_argument("--kv-cache-dtype", help="the engine's flag; then the rows are not of default flags: give a --label")
    parser.add_argument("--only", nargs="+", choices=("decode", "prefill"), default=("decode", "prefill"))
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--prefills", nargs="*", default=["64x2048", "8x8192"], metavar="COUNTxLENGTH")
    parser.add_argument("--tokens-in", type=int, default=1024)
    parser.add_argument("--tokens-out", type=int, default=257)
    parser.add_argument("--max-total-tokens", type=int, default=MAX_TOTAL_TOKENS)
    parser.add_argument("--mesh", default="1x1", help="the engine's flag")
    parser.add_argument("--max-batch-size", type=int, help="likewise; fewer programs are compiled")
    parser.add_argument("--max-batch-prefill-tokens", type=int, help="likewise")
    parser.add_argument("--disable-custom-all-reduce", action="store_true", help="likewise; give a --label")
    parser.add_argument("--attention", default="auto", help="likewise")
    parser.add_argument("--deterministic", action="store_true", help="likewise")
    parser.add_argument("--repetitions", type=int, default=3)
    add_row_flags(parser)
    arguments = parser.parse_args()
    num_replicas, tensor_size = parse_mesh(arguments.mesh)
    if num_replicas > 1:
        parser.error("one replica is measured here, --mesh 1xT; of several benchmarks.http_scaling tells")
    logging.basicConfig(format="%(asctime)s %(message)s")
    logging.getLogger("jaxserve").setLevel(logging.INFO)
    begin = time.perf_counter()
    options = dict(prefix_caching=False, max_total_tokens=arguments.max_total_tokens, attention=arguments.attention)
    for name in ("mesh", "deterministic", "max_batch_size", "max_batch_prefill_tokens", "disable_custom_all_reduce"):
        options[name] = getattr(arguments, name)
    if arguments.kv_cache_dtype is not None:
        options["kv_cache_dtype"] = arguments.kv_cache_dtype
    with quantized_model(arguments.folder, arguments.quantize) as (folder, weights):
        llm = LLM(str(folder), **weights, **options)
    print(f"ready after {time.perf_counter() - begin:.1f} s on {llm.info.device}, {llm.info.dtype}, {llm.info.num_pages} pages", flush=True)
    fixed = [[7 + i * j % 900 for j in range(1, 8 * i)] for i in (1, 5, 12)]
    told = llm.generate(fixed, SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True))
    answers = [list(output.outputs[0].token_ids) for output in told]
    print("greedy tokens of fixed prompts:", answers, flush=True)
    if len({token for answer in answers for token in answer}) == 1:
        raise SystemExit("constant logits: the run is void")
    rows = make_rows(arguments, llm.info.device)
    prefix, label = name_parts(arguments.quantize, arguments.label, tensor_size)
    measurement = Measurement(llm, rows, prefix, label, arguments.tokens_in, arguments.tokens_out, arguments.repetitions)
    if "prefill" in arguments.only:
        for prefill in arguments.prefills:
            measurement.prefill(*map(int, prefill.split("x")))
    if "decode" in arguments.only:
        for size in arguments.batch_sizes:
            measurement.decode(size)
    stats = llm.engines[0].stats()
    print(f"{stats.num_steps} steps, {stats.compile_events} compile events, {_share(stats):.1%} of the tokens were padding")
    rows.show()
    if stats.compile_events:
        raise SystemExit("something was compiled after ready")


def _difference(before: object, after: object, name: str) -> float:
    return getattr(after, name) - getattr(before, name)


def _share(stats: object) -> float:
    padded, useful = getattr(stats, "padded_tokens", 0), getattr(stats, "useful_tokens", 0)
    return padded / max(padded + useful, 1)


if __name__ == "__main__":
    main()
