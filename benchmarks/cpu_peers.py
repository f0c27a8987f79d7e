"""The demo model on the CPU: jaxserve, transformers' `generate` (float32, static batch) and llama.cpp, in one run.

Each side runs in a process of its own, one after the other, on the same prompts (random token ids), greedy, `ignore_eos`, the same
number of output tokens. tok/s is output tokens over the wall time of one call that generates them all, after one unmeasured call of
the same shape.

    python -m benchmarks.cpu_peers --gguf MODEL.gguf --reference-python TORCH_PYTHON [--llama-python XLLAMACPP_PYTHON]

prints one JSON line a side and concurrency. The reference interpreter needs torch, transformers and gguf; the llama.cpp one xllamacpp.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

PROMPT_TOKENS = 64
OUTPUT_TOKENS = 128
REPEATS = 3
THREADS = 2


def make_prompts(count: int) -> list[list[int]]:
    """Random token ids, the same for every side, new for every repeat through the generator's state."""
    return [[GENERATOR.randrange(100, 49000) for _ in range(PROMPT_TOKENS)] for _ in range(count)]


GENERATOR = random.Random(1)


def measure(side: str, concurrency: int, generate: Callable[[list[list[int]]], int]) -> None:
    """Run `generate` (prompts -> output tokens) once unmeasured and REPEATS times measured; print the median."""
    generate(make_prompts(concurrency))
    rates = []
    for _ in range(REPEATS):
        prompts = make_prompts(concurrency)
        begin = time.perf_counter()
        tokens = generate(prompts)
        rates.append(tokens / (time.perf_counter() - begin))
    print(
        json.dumps(
            {"side": side, "concurrency": concurrency, "tok_s": round(statistics.median(rates), 1), "all": [round(r, 1) for r in rates]}
        ),
        flush=True,
    )


def run_jaxserve(gguf: str, concurrencies: list[int]) -> None:
    """The in-process LLM with its default settings."""
    from jaxserve import LLM, SamplingParams

    llm = LLM(gguf)
    params = SamplingParams(temperature=0.0, max_tokens=OUTPUT_TOKENS, ignore_eos=True)
    for concurrency in concurrencies:
        measure("jaxserve", concurrency, lambda prompts: sum(len(o.outputs[0].token_ids) for o in llm.generate(prompts, params)))


def run_transformers(gguf: str, concurrencies: list[int]) -> None:
    """transformers' generate on torch, float32, one static batch."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(THREADS)
    path = Path(gguf)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()

    def generate(prompts: list[list[int]]) -> int:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=OUTPUT_TOKENS, max_new_tokens=OUTPUT_TOKENS
            )
        return int(out.shape[0] * (out.shape[1] - PROMPT_TOKENS))

    for concurrency in concurrencies:
        measure("transformers", concurrency, generate)


def run_llama(gguf: str, concurrencies: list[int]) -> None:
    """llama.cpp's own server through xllamacpp: the quantized weights as they are, continuous batching."""
    from concurrent.futures import ThreadPoolExecutor

    import xllamacpp

    for concurrency in concurrencies:
        params = xllamacpp.CommonParams()
        params.model.path = gguf
        params.n_ctx = concurrency * (PROMPT_TOKENS + OUTPUT_TOKENS + 16)
        params.n_parallel = concurrency
        params.cpuparams.n_threads = THREADS
        params.cpuparams_batch.n_threads = THREADS
        server = xllamacpp.Server(params)

        def one(prompt: list[int], server=server) -> int:
            answer = server.handle_completions(
                {"prompt": prompt, "max_tokens": OUTPUT_TOKENS, "temperature": 0.0, "ignore_eos": True, "cache_prompt": False}
            )
            answer = json.loads(answer) if isinstance(answer, str) else answer
            return answer["usage"]["completion_tokens"]

        with ThreadPoolExecutor(concurrency) as pool:
            measure("llama.cpp", concurrency, lambda prompts, pool=pool, one=one: sum(pool.map(one, prompts)))
        del server


SIDES = {"jaxserve": run_jaxserve, "transformers": run_transformers, "llama": run_llama}


def main() -> None:
    """Run one side (`--side`, in its own interpreter) or all of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gguf", required=True)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--reference-python", help="interpreter with torch and transformers")
    parser.add_argument("--llama-python", help="interpreter with xllamacpp")
    parser.add_argument("--side", choices=sorted(SIDES))
    args = parser.parse_args()
    if args.side:
        SIDES[args.side](args.gguf, args.concurrency)
        return
    interpreters = {"jaxserve": sys.executable, "transformers": args.reference_python, "llama": args.llama_python}
    for side, python in interpreters.items():
        if python:
            command = [
                python,
                "-m",
                "benchmarks.cpu_peers",
                "--side",
                side,
                "--gguf",
                args.gguf,
                "--concurrency",
                *map(str, args.concurrency),
            ]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
