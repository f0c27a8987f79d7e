"""`jaxserve bench serve`: requests to a running server at a rate, each one's stream clocked."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from jaxserve.bench.figures import RequestFigures, summarize
from jaxserve.bench.options import ServeOptions, WorkloadOptions
from jaxserve.bench.report import Report, describe_options
from jaxserve.bench.workload import WorkItem, as_text, make_workload
from jaxserve.client import Client, ServerError, connect
from jaxserve.config import ModelOptions
from jaxserve.tokenizer import Tokenizer, load_tokenizer
from jaxserve.weights import resolve_model
from jaxserve.weights.demo import DEMO_MODEL_ID

PATH = "/v1/completions"


async def bench_serve(options: ServeOptions, workload: WorkloadOptions) -> Report:
    """Measure a server.

    Raises:
        ServerError: the server is not there, or refuses the request that is sent first to try it.
        StartupError: the tokenizer cannot be had.
    """
    async with connect(options.url, options.api_key) as client:
        served = await client.models()
        model = options.model or served[0]["id"]
        tokenizer = _load_tokenizer(options.tokenizer or served[0].get("root") or served[0]["id"])
        items = make_workload(workload, tokenizer.vocab_size, tokenizer)
        bodies = [_body(item, as_text(item, tokenizer), model, options) for item in items]
        trial = await measure_request(client, bodies[0])
        if trial.error:
            raise ServerError(f"the server failed the first request: {trial.error}")
        await asyncio.gather(*(measure_request(client, bodies[i % len(bodies)]) for i in range(options.num_warmups)))
        requests, seconds = await measure(client, bodies, arrival_times(options, len(bodies), workload.seed), options.max_concurrency)
        system = {"model_id": model, **await _server_info(client)}
    return Report("serve", summarize(requests, seconds) | _errors(requests), system, describe_options(options, workload))


async def measure(
    client: Client, bodies: Sequence[dict[str, Any]], arrivals: Sequence[float], max_concurrency: int | None
) -> tuple[list[RequestFigures], float]:
    """Send each body at its time.

    Args:
        arrivals: seconds after the start, one a body, not falling.

    Returns:
        figures of each request, and the seconds of the whole run.
    """
    permits = asyncio.Semaphore(max_concurrency or len(bodies))
    bar = tqdm(total=len(bodies), unit="request", disable=None, dynamic_ncols=True)

    async def one(body: dict[str, Any]) -> RequestFigures:
        async with permits:
            figures = await measure_request(client, body)
        bar.update()
        return figures

    started = time.perf_counter()
    tasks = [asyncio.create_task(one(body)) async for body in _paced(bodies, arrivals, started)]
    requests = await asyncio.gather(*tasks)
    seconds = time.perf_counter() - started
    bar.close()
    return list(requests), seconds


async def measure_request(client: Client, body: dict[str, Any]) -> RequestFigures:
    """Clock one request; a failure is told in `error`."""
    figures = RequestFigures(sent=time.perf_counter())
    try:
        async for event in client.stream(PATH, body):
            if event.get("choices"):
                figures.arrivals.append(time.perf_counter())
            if usage := event.get("usage"):
                figures.prompt_tokens, figures.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
    except ServerError as error:
        figures.error = str(error)
    if not figures.error and not figures.arrivals:
        figures.error = "the stream held no token"
    return figures


def arrival_times(options: ServeOptions, count: int, seed: int) -> list[float]:
    """Seconds after the start at which requests are sent.

    Gaps are gamma distributed with the options' burstiness (1: exponential, so arrivals are a Poisson process), then stretched so that
    the last request is due at count / rate, as `vllm bench serve` does: else few requests would miss the rate by chance.
    """
    if np.isinf(options.request_rate):
        return [0.0] * count
    gaps = np.random.default_rng(seed).gamma(options.burstiness, 1 / (options.request_rate * options.burstiness), count)
    times = np.cumsum(gaps)
    return (times * (count / options.request_rate / times[-1])).tolist()


async def _paced(bodies: Sequence[dict[str, Any]], arrivals: Sequence[float], started: float) -> AsyncIterator[dict[str, Any]]:
    for body, due in zip(bodies, arrivals, strict=True):
        wait = started + due - time.perf_counter()
        if wait > 0:
            await asyncio.sleep(wait)
        yield body


def _body(item: WorkItem, text: str, model: str, options: ServeOptions) -> dict[str, Any]:
    body: dict[str, Any] = {"model": model, "prompt": text, "max_tokens": item.output_len, "stream_options": {"include_usage": True}}
    if options.temperature is not None:
        body["temperature"] = options.temperature
    if options.ignore_eos:
        body["ignore_eos"] = True
    return body


def _load_tokenizer(model_id: str) -> Tokenizer:
    # The demo model is served under its hub name, but comes from elsewhere; of any other model the weights are not wanted.
    options = ModelOptions() if model_id == DEMO_MODEL_ID else ModelOptions(model_id=model_id, load_format="dummy")
    return load_tokenizer(resolve_model(options).path)


async def _server_info(client: Client) -> dict[str, Any]:
    try:
        return await client.get("/info")
    except ServerError:
        return {}  # not a TGI or jaxserve server


def _errors(requests: Sequence[RequestFigures]) -> dict[str, Any]:
    errors = sorted({request.error for request in requests if request.error})
    return {"errors": errors} if errors else {}
