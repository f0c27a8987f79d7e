"""`jaxserve bench throughput` and `bench latency`: the engine in this process, no HTTP."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from tqdm import tqdm

from jaxserve.bench.options import LatencyOptions, ThroughputOptions, WorkloadOptions
from jaxserve.bench.profile import profile
from jaxserve.bench.report import Report, describe_options
from jaxserve.bench.workload import draw_ids, make_workload
from jaxserve.llm import LLM, RequestOutput
from jaxserve.request import SamplingParams

PERCENTILES = (10, 25, 50, 75, 90, 99)


def bench_throughput(llm: LLM, options: ThroughputOptions, workload: WorkloadOptions) -> Report:
    """All requests at once; tokens a second of the whole. End-of-sequence tokens are ignored, so that every output has its full length."""
    items = make_workload(workload, llm.info.vocab_size, llm.tokenizer)
    params = [SamplingParams(temperature=options.temperature, ignore_eos=True, max_tokens=item.output_len) for item in items]
    prompts = [list(item.token_ids) for item in items]
    # Other ids than the measured ones: those must not come from the prefix cache.
    rng = np.random.default_rng(workload.seed + 1)
    if options.num_warmups:
        warmups = [list(draw_ids(rng, len(prompts[i % len(prompts)]), llm.info.vocab_size)) for i in range(options.num_warmups)]
        llm.generate(warmups, [params[i % len(params)] for i in range(options.num_warmups)])
    started = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=True)
    seconds = time.perf_counter() - started
    prompt_tokens, output_tokens = _count(outputs)
    figures = {
        "elapsed_time": seconds,
        "num_requests": len(outputs),
        "total_input_tokens": prompt_tokens,
        "total_output_tokens": output_tokens,
        "cached_tokens": sum(output.num_cached_tokens for output in outputs),
        "requests_per_second": len(outputs) / seconds,
        "output_tokens_per_second": output_tokens / seconds,
        "tokens_per_second": (prompt_tokens + output_tokens) / seconds,
    }
    lines: list[str] = []
    if options.profile is not None:
        # Other ids here too.
        lines = profile(llm, [list(draw_ids(rng, len(prompt), llm.info.vocab_size)) for prompt in prompts], params, options.profile)
    return Report("throughput", figures, asdict(llm.info), describe_options(options, workload), lines)


def bench_latency(llm: LLM, options: LatencyOptions) -> Report:
    """One batch after the other, each with new token ids, so that none comes from the prefix cache; seconds a batch."""
    rng = np.random.default_rng(options.seed)
    params = SamplingParams(temperature=options.temperature, ignore_eos=True, max_tokens=options.output_len)
    latencies = []
    for iteration in tqdm(range(options.num_iters_warmup + options.num_iters), unit="batch", disable=None, dynamic_ncols=True):
        prompts = [list(draw_ids(rng, options.input_len, llm.info.vocab_size)) for _ in range(options.batch_size)]
        started = time.perf_counter()
        llm.generate(prompts, params)
        if iteration >= options.num_iters_warmup:
            latencies.append(time.perf_counter() - started)
    figures: dict[str, Any] = {"avg_latency": float(np.mean(latencies))}
    figures |= {f"p{p}_latency": float(np.percentile(latencies, p)) for p in PERCENTILES}
    figures["output_tokens_per_second"] = options.batch_size * options.output_len / figures["avg_latency"]
    figures["latencies"] = latencies
    lines: list[str] = []
    if options.profile is not None:
        prompts = [list(draw_ids(rng, options.input_len, llm.info.vocab_size)) for _ in range(options.batch_size)]
        lines = profile(llm, prompts, [params] * len(prompts), options.profile)
    return Report("latency", figures, asdict(llm.info), describe_options(options), lines)


def _count(outputs: Sequence[RequestOutput]) -> tuple[int, int]:
    """(prompt tokens, output tokens)."""
    return sum(len(o.prompt_token_ids) for o in outputs), sum(len(sample.token_ids) for o in outputs for sample in o.outputs)
