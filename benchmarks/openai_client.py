"""The OpenAI SDK as a client of a running server: what `jaxserve bench serve` says, measured by someone else's code.

    python benchmarks/openai_client.py --url http://127.0.0.1:3000 --num-prompts 64 --max-concurrency 16

Random words in, a fixed number of tokens out, greedy. Prints one JSON line: output tokens a second, mean TTFT and mean TPOT in ms.
"""

import argparse
import asyncio
import json
import random
import statistics
import time

import openai


async def measure(client: openai.AsyncOpenAI, prompt: str, output_tokens: int) -> tuple[float, float, int]:
    """Seconds to the first chunk with text, seconds to the last, and output tokens by the server's count."""
    begin = time.perf_counter()
    first = last = 0.0
    tokens = 0
    stream = await client.completions.create(
        model="tgi",
        prompt=prompt,
        max_tokens=output_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    async for chunk in stream:
        if chunk.choices:
            last = time.perf_counter() - begin
            first = first or last
        if chunk.usage:
            tokens = chunk.usage.completion_tokens
    return first, last, tokens


async def run(args: argparse.Namespace) -> None:
    """Send all prompts, at most max_concurrency at a time."""
    generator = random.Random(args.seed)
    words = ["river", "stone", "light", "paper", "engine", "garden", "window", "number", "winter", "music"]
    prompts = [
        " ".join(generator.choice(words) + str(generator.randrange(10)) for _ in range(args.input_words)) for _ in range(args.num_prompts)
    ]
    permits = asyncio.Semaphore(args.max_concurrency)
    async with openai.AsyncOpenAI(base_url=f"{args.url}/v1", api_key="-") as client:

        async def one(prompt: str) -> tuple[float, float, int]:
            async with permits:
                return await measure(client, prompt, args.output_tokens)

        await measure(client, "warm up", 2)
        begin = time.perf_counter()
        results = await asyncio.gather(*map(one, prompts))
        wall = time.perf_counter() - begin
    figures = {
        "output_tok_s": sum(tokens for _, _, tokens in results) / wall,
        "mean_ttft_ms": 1000 * statistics.mean(first for first, _, _ in results),
        "mean_tpot_ms": 1000 * statistics.mean((last - first) / (tokens - 1) for first, last, tokens in results),
    }
    print(json.dumps({name: round(value, 2) for name, value in figures.items()}))


def main() -> None:
    """Read the arguments and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:3000")
    parser.add_argument("--num-prompts", type=int, default=64)
    parser.add_argument("--max-concurrency", type=int, default=16)
    parser.add_argument("--input-words", type=int, default=24)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
