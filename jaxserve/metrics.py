"""What /metrics tells: vLLM's core names, which routers know, TGI's names, which its dashboards know, and jaxserve's own.

Two kinds of value are joined in one answer. What http processes count of requests is kept per process by prometheus-client, in memory
files of the folder in PROMETHEUS_MULTIPROC_DIR (the launcher sets it), so that any http process answers for all of them, and a worker
that died still counts. What engines count comes with the statistics each engine sends to every http process, labelled by `replica`;
a replica that is down keeps its last counters and reports no running requests. What routers read is told of all replicas together.

TGI's counters end without `_total`; they are exposed under TGI's names, untyped.
"""

import math
import os
import time
from bisect import bisect_left
from collections import Counter as TallyCounter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Protocol

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.utils import floatToGoString

from jaxserve.request import STEP_TIME_BOUNDS, EngineInfo, EngineStats, FinishReason, Request, TokenOutput

prometheus_client.disable_created_metrics()

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST
SECONDS = tuple(1.5**k * 1e-3 for k in range(30))  # 1 ms to 128 s
TGI_SECONDS = tuple(1.5**k * 0.00015 for k in range(35))
TOKENS = tuple(float(2**k) for k in range(18))
GAPS_AT_ONCE = 32
SAMPLES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)

# Name in EngineStats -> metric, help.
_ENGINE_GAUGES = {
    "num_running": ("jaxserve_requests_running", "Samples that are in the running batch."),
    "num_waiting": ("jaxserve_requests_waiting", "Samples that wait to be scheduled."),
}
_ENGINE_COUNTERS = {
    "prefix_queries": ("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache."),
    "prefix_hits": ("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache."),
    "num_preemptions": ("vllm:num_preemptions", "Samples that gave up their pages and were computed again."),
    "prompt_tokens": ("vllm:prompt_tokens", "Prompt tokens, computed or cached."),
    "output_tokens": ("vllm:generation_tokens", "Output tokens."),
    "num_steps": ("jaxserve_steps", "Steps dispatched."),
    "padded_tokens": ("jaxserve_padded_tokens", "Tokens computed in vain because of bucket sizes."),
    "useful_tokens": ("jaxserve_useful_tokens", "Tokens computed that a request needed."),
    "compile_events": ("jaxserve_compile_events", "Programs compiled after ready; must stay 0."),
}
_STEP_PARTS = ("schedule", "dispatch", "device", "collect")
_STEP_BOUNDS = tuple(floatToGoString(bound) for bound in (*STEP_TIME_BOUNDS, math.inf))
# As vLLM calls them.
_REASONS = {
    FinishReason.EOS: "stop",
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.ABORT: "abort",
    FinishReason.ERROR: "error",
    FinishReason.INVALID: "error",
}


class MeasuredEngine(Protocol):
    """What is read of an engine (rpc.EngineClient has it)."""

    replica: int
    available: bool
    num_losses: int
    info: EngineInfo | None
    stats: EngineStats


class BulkHistogram(Histogram):
    """A histogram that takes many values at once, for what happens with every token."""

    def observe_many(self, values: Sequence[float]) -> None:
        """Observe each value; costs 0.2 us a value where observe() costs 2.4."""
        self._sum.inc(sum(values))
        for bucket, count in TallyCounter([bisect_left(self._upper_bounds, value) for value in values]).items():
            self._buckets[bucket].inc(count)


class Metrics:
    """Everything this http process counts; one a process.

    Args:
        engines: whose statistics /metrics tells.
        served_model_name: label `model_name` of all vllm: metrics; None for the model id that the engines tell.
    """

    def __init__(self, engines: Sequence[MeasuredEngine], served_model_name: str | None):
        self._engines = engines
        self._served_model_name = served_model_name
        self._registry = CollectorRegistry(auto_describe=False)

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(name, text, buckets=buckets, registry=self._registry)

        self.time_to_first_token = histogram("vllm:time_to_first_token_seconds", "From arrival to the first token.", SECONDS)
        self.inter_token_latency = BulkHistogram(
            "vllm:inter_token_latency_seconds", "Between two outputs of a sample.", buckets=SECONDS, registry=self._registry
        )
        self.time_per_output_token = histogram("vllm:request_time_per_output_token_seconds", "Mean of a request after its first.", SECONDS)
        self.e2e_latency = histogram("vllm:e2e_request_latency_seconds", "From arrival to the last token.", SECONDS)
        self.queue_time = histogram("vllm:request_queue_time_seconds", "From arrival in the engine to the first step.", SECONDS)
        self.inference_time = histogram("vllm:request_inference_time_seconds", "From the first step to the last token.", SECONDS)
        self.prefill_time = histogram("vllm:request_prefill_time_seconds", "From the first step to the first token.", SECONDS)
        self.decode_time = histogram("vllm:request_decode_time_seconds", "From the first token to the last.", SECONDS)
        self.request_prompt_tokens = histogram("vllm:request_prompt_tokens", "Prompt tokens of a request.", TOKENS)
        self.request_generation_tokens = histogram("vllm:request_generation_tokens", "Output tokens of a request.", TOKENS)
        self.request_n = histogram("vllm:request_params_n", "Samples of a request.", SAMPLES)
        self.request_max_tokens = histogram("vllm:request_params_max_tokens", "Wanted output tokens, where given.", TOKENS)
        self._success = Counter("vllm:request_success", "Samples that ended, by reason.", ["finished_reason"], registry=self._registry)
        self.tgi_count = Counter("tgi_request_count", "Requests.", registry=self._registry)
        self.tgi_success = Counter("tgi_request_success", "Requests that ended well.", registry=self._registry)
        self.tgi_failure = Counter("tgi_request_failure", "Requests that were refused or failed.", ["err"], registry=self._registry)
        self.tgi_duration = histogram("tgi_request_duration", "Seconds from arrival to the end.", TGI_SECONDS)
        self.tgi_validation = histogram("tgi_request_validation_duration", "Seconds of parsing and tokenizing.", TGI_SECONDS)
        self.tgi_queue = histogram("tgi_request_queue_duration", "Seconds waiting in the engine.", TGI_SECONDS)
        self.tgi_inference = histogram("tgi_request_inference_duration", "Seconds of computing.", TGI_SECONDS)
        self.tgi_per_token = histogram("tgi_request_mean_time_per_token_duration", "Seconds a token.", TGI_SECONDS)
        self.tgi_generated = histogram("tgi_request_generated_tokens", "Output tokens.", TOKENS)
        self.tgi_input = histogram("tgi_request_input_length", "Prompt tokens.", TOKENS)
        self.tgi_skipped = histogram("tgi_request_skipped_tokens", "Tokens that speculation saved.", TOKENS)
        self.tgi_max_new = histogram("tgi_request_max_new_tokens", "Wanted output tokens.", TOKENS)

    def ended(self, reason: str) -> None:
        """Count a sample's end."""
        self._success.labels(reason).inc()

    def exposition(self) -> bytes:
        """The whole server's values in Prometheus' text format."""
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            requests = CollectorRegistry(auto_describe=False)
            MultiProcessCollector(requests)
        else:
            requests = self._registry
        joined = CollectorRegistry(auto_describe=False)
        joined.register(_Joined(requests, self))
        return generate_latest(joined)

    def engine_families(self) -> Iterator[Metric]:
        """What the engines told, by replica."""
        for field, (name, text) in _ENGINE_GAUGES.items():
            gauge = GaugeMetricFamily(name, text, labels=("replica",))
            for engine in self._engines:
                gauge.add_metric((str(engine.replica),), getattr(engine.stats, field) if engine.available else 0)
            yield gauge
        for field, (name, text) in _ENGINE_COUNTERS.items():
            counter = CounterMetricFamily(name, text, labels=("replica",))
            for engine in self._engines:
                counter.add_metric((str(engine.replica),), getattr(engine.stats, field))
            yield counter
        yield self._step_times()
        usage = GaugeMetricFamily("jaxserve_kv_cache_usage", "Share of KV pages in use, 0 to 1.", labels=("replica",))
        up = GaugeMetricFamily("jaxserve_engine_up", "Whether the engine can be asked.", labels=("replica",))
        losses = CounterMetricFamily("jaxserve_engine_losses", "Times that the engine could be asked no longer.", labels=("replica",))
        for engine in self._engines:
            stats = engine.stats
            usage.add_metric((str(engine.replica),), stats.num_pages_used / stats.num_pages if stats.num_pages and engine.available else 0)
            up.add_metric((str(engine.replica),), int(engine.available))
            losses.add_metric((str(engine.replica),), engine.num_losses)
        yield from (usage, up, losses)
        yield from self._for_routers()
        live = [engine.stats for engine in self._engines if engine.available]
        yield GaugeMetricFamily("tgi_queue_size", "Samples that wait.", value=sum(stats.num_waiting for stats in live))
        yield GaugeMetricFamily("tgi_batch_current_size", "Samples that run.", value=sum(stats.num_running for stats in live))
        capacity = sum(engine.info.page_size * engine.info.num_pages for engine in self._engines if engine.info)
        yield GaugeMetricFamily("tgi_batch_max_total_tokens", "Tokens that the KV caches hold.", value=capacity)
        used = sum(e.stats.num_pages_used * e.info.page_size for e in self._engines if e.available and e.info)
        yield GaugeMetricFamily("tgi_batch_current_max_tokens", "Tokens of KV cache that requests hold.", value=used)
        yield from self._tgi_batches()

    def _for_routers(self) -> Iterator[Metric]:
        """What routers read of a server, under vLLM's names of today and of 2025: one value each, whatever the number of replicas.

        The Gateway API Inference Extension and the routers made like it take one sample of a name, and a gauge is not summed by anybody.
        """
        live = [engine.stats for engine in self._engines if engine.available]
        yield GaugeMetricFamily("vllm:num_requests_running", "Samples that run.", value=sum(stats.num_running for stats in live))
        yield GaugeMetricFamily("vllm:num_requests_waiting", "Samples that wait.", value=sum(stats.num_waiting for stats in live))
        pages = sum(stats.num_pages for stats in live)
        usage = sum(stats.num_pages_used for stats in live) / pages if pages else 0.0
        for name in ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"):
            yield GaugeMetricFamily(name, "Share of KV pages in use, 0 to 1.", value=usage)
        for name, field in (("queries", "prefix_queries"), ("hits", "prefix_hits")):
            total = sum(getattr(engine.stats, field) for engine in self._engines)
            yield CounterMetricFamily(f"vllm:gpu_prefix_cache_{name}", "As vllm:prefix_cache_*, of all replicas.", value=total)
        infos = [engine.info for engine in self._engines if engine.info is not None]
        cache = GaugeMetricFamily("vllm:cache_config_info", "Sizes of the KV cache.", labels=("block_size", "num_gpu_blocks"))
        if infos:
            cache.add_metric((str(infos[0].page_size), str(sum(info.num_pages for info in infos))), 1)
        yield cache
        # A router that looks for adapters finds that there are none, and is not left to complain about a missing metric.
        adapters = ("max_lora", "running_lora_adapters", "waiting_lora_adapters")
        lora = GaugeMetricFamily("vllm:lora_requests_info", "LoRA adapters: none; the value is the time.", labels=adapters)
        lora.add_metric(("0", "", ""), time.time())
        yield lora

    def _tgi_batches(self) -> Iterator[Metric]:
        """TGI's metrics of batches. A step computes prompts and decodes together; all are told as method="decode"."""
        steps = sum(engine.stats.num_steps for engine in self._engines)
        for name, text in (("count", "Steps."), ("success", "Steps that ended well.")):
            counter = CounterMetricFamily(f"tgi_batch_inference_{name}", text, labels=("method",))
            counter.add_metric(("decode",), steps)
            yield counter
        counts = [sum(each) for each in zip(*(e.stats.device_counts or (0,) * len(_STEP_BOUNDS) for e in self._engines), strict=True)]
        seconds = sum(engine.stats.device_seconds for engine in self._engines)
        for name in ("inference", "forward"):
            family = HistogramMetricFamily(f"tgi_batch_{name}_duration", "Seconds from dispatch to tokens.", labels=("method",))
            family.add_metric(("decode",), list(zip(_STEP_BOUNDS, accumulate(counts), strict=True)), seconds)
            yield family

    def _step_times(self) -> Metric:
        text = "Seconds of a step's parts: host scheduling and dispatching, the device computing, the host waiting for the tokens."
        family = HistogramMetricFamily("jaxserve_step_seconds", text, labels=("part", "replica"))
        for engine in self._engines:
            for part in _STEP_PARTS:
                counts = getattr(engine.stats, f"{part}_counts") or (0,) * len(_STEP_BOUNDS)
                buckets = list(zip(_STEP_BOUNDS, accumulate(counts), strict=True))
                family.add_metric((part, str(engine.replica)), buckets, getattr(engine.stats, f"{part}_seconds"))
        return family

    @property
    def model_name(self) -> str:
        """Label of the vllm: metrics."""
        return self._served_model_name or next((engine.info.model_id for engine in self._engines if engine.info is not None), "")


class _Joined:
    """Collector of request and engine values: vllm: metrics get their model name, TGI's counters their name."""

    def __init__(self, requests: CollectorRegistry, metrics: Metrics):
        self._requests = requests
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        name = self._metrics.model_name
        for family in chain(self._requests.collect(), self._metrics.engine_families()):
            if family.name.startswith("vllm:"):
                labelled = Metric(family.name, family.documentation, family.type)
                for sample in family.samples:
                    labelled.add_sample(sample.name, {"model_name": name, **sample.labels}, sample.value)
                yield labelled
            elif family.name.startswith("tgi_") and family.type == "counter":
                renamed = Metric(family.name, family.documentation, "untyped")
                for sample in family.samples:
                    renamed.add_sample(sample.name.removesuffix("_total"), sample.labels, sample.value)
                yield renamed
            else:
                yield family


@dataclass(slots=True)
class RequestTimes:
    """Seconds of one request, as response headers tell them."""

    total: float = 0.0
    validation: float = 0.0
    queue: float = 0.0
    inference: float = 0.0


class RequestMeter:
    """Measures one request from arrival to end.

    Args:
        metrics: where it counts.
        arrived: time.perf_counter() when the HTTP request came in.
        request: as sent to the engine, just now.

    Attributes:
        queue_time: seconds from arrival in the engine to the first step.
        num_output_tokens: of the samples that ended.
        num_cached_tokens: prompt tokens that the prefix cache had.
    """

    def __init__(self, metrics: Metrics, arrived: float, request: Request):
        now = time.perf_counter()
        self._metrics = metrics
        self._arrived = arrived
        self._submitted = now
        self._request = request
        self._last_output: list[float] = [0.0] * request.params.n
        self._gaps: list[float] = []
        self._first_token = 0.0
        self.queue_time = 0.0
        self._num_unfinished = request.params.n
        self.num_output_tokens = 0
        self.num_cached_tokens = 0
        metrics.tgi_count.inc()
        metrics.tgi_validation.observe(now - arrived)
        metrics.request_prompt_tokens.observe(len(request.prompt_token_ids))
        metrics.tgi_input.observe(len(request.prompt_token_ids))
        metrics.request_n.observe(request.params.n)
        if request.params.max_tokens is not None:
            metrics.request_max_tokens.observe(request.params.max_tokens)
            metrics.tgi_max_new.observe(request.params.max_tokens)

    @property
    def validation_time(self) -> float:
        """Seconds of parsing and tokenizing."""
        return self._submitted - self._arrived

    @property
    def first_token_time(self) -> float:
        """Seconds from arrival to the first token; 0 while there is none."""
        return self._first_token - self._arrived if self._first_token else 0.0

    def output(self, output: TokenOutput, now: float) -> None:
        """Count an output that was read just now."""
        last = self._last_output[output.index]
        self._last_output[output.index] = now
        if last:
            self._gaps.append(now - last)
            if len(self._gaps) == GAPS_AT_ONCE:
                self._tell_gaps()
            return
        if not self._first_token:
            self._first_token = now
            self.queue_time = output.queue_time
            self.num_cached_tokens = output.num_cached_tokens
            self._metrics.time_to_first_token.observe(now - self._arrived)
            self._metrics.queue_time.observe(output.queue_time)
            self._metrics.tgi_queue.observe(output.queue_time)

    def _tell_gaps(self) -> None:
        self._metrics.inter_token_latency.observe_many(self._gaps)
        self._gaps.clear()

    def sample_ended(self, reason: FinishReason, num_tokens: int) -> None:
        """Count a sample's end and its output tokens."""
        self.num_output_tokens += num_tokens
        self._num_unfinished -= 1
        self._tell_gaps()
        self._metrics.ended(_REASONS[reason])

    def succeeded(self) -> RequestTimes:
        """Count the request's end, once all samples have ended; returns what it took."""
        now = time.perf_counter()
        metrics, tokens = self._metrics, self.num_output_tokens
        times = RequestTimes(now - self._arrived, self.validation_time, self.queue_time, now - self._submitted - self.queue_time)
        metrics.e2e_latency.observe(times.total)
        metrics.inference_time.observe(times.inference)
        metrics.prefill_time.observe(max(self._first_token - self._submitted - self.queue_time, 0.0))
        metrics.decode_time.observe(now - self._first_token)
        metrics.request_generation_tokens.observe(tokens)
        if tokens > 1:
            metrics.time_per_output_token.observe((now - self._first_token) / (tokens - 1))
        metrics.tgi_success.inc()
        metrics.tgi_duration.observe(times.total)
        metrics.tgi_inference.observe(times.inference)
        metrics.tgi_per_token.observe(times.inference / max(tokens, 1))
        metrics.tgi_generated.observe(tokens)
        metrics.tgi_skipped.observe(0)
        return times

    def dropped(self) -> None:
        """Count what still ran when the client hung up."""
        self._metrics.tgi_failure.labels("dropped").inc()
        self._tell_gaps()
        for _ in range(self._num_unfinished):
            self._metrics.ended("abort")

    def failed(self) -> None:
        """Count what still ran when the engine failed; the failure itself is counted where it is answered."""
        for _ in range(self._num_unfinished):
            self._metrics.ended("error")
