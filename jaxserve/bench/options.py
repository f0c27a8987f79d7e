"""Settings of the benchmarks; names and defaults are those of `vllm bench` where it has the option."""

from dataclasses import dataclass

from jaxserve.config import option

DATASETS = ("random", "sharegpt")


@dataclass(frozen=True, slots=True)
class WorkloadOptions:
    """Which prompts, how long, and how many tokens each asks for."""

    dataset: str = option("random", "random: token ids; sharegpt: lengths as in ShareGPT, and its texts with --dataset-path.", DATASETS)
    dataset_path: str | None = option(None, "ShareGPT_V3_unfiltered_cleaned_split.json or a file like it.", metavar="FILE")
    num_prompts: int = option(1000, "Requests.", low=1)
    random_input_len: int = option(1024, "Prompt tokens of a random request.", low=1)
    random_output_len: int = option(128, "Output tokens of a random request.", low=1)
    random_range_ratio: float = option(0.0, "Lengths are drawn from the length x (1 - ratio) to x (1 + ratio).", low=0, high=1)
    seed: int = option(0, "Of lengths, token ids and arrivals.", low=0)


@dataclass(frozen=True, slots=True)
class ThroughputOptions:
    """How `bench throughput` samples."""

    temperature: float = option(1.0, "0 is greedy.", low=0)
    num_warmups: int = option(1, "Requests before the clock starts.", low=0)
    profile: str | None = option(None, "Then trace some steady steps, keep the trace here and show what they did.", metavar="DIR")
    output_json: str | None = option(None, "Write figures, versions, device and command here.", metavar="FILE")


@dataclass(frozen=True, slots=True)
class LatencyOptions:
    """What `bench latency` repeats."""

    batch_size: int = option(8, "Requests of one batch.", low=1)
    input_len: int = option(32, "Prompt tokens a request.", low=1)
    output_len: int = option(128, "Output tokens a request.", low=1)
    num_iters_warmup: int = option(10, "Batches before the clock starts.", low=0)
    num_iters: int = option(30, "Batches that are timed.", low=1)
    temperature: float = option(1.0, "0 is greedy.", low=0)
    profile: str | None = option(None, "Then trace some steady steps, keep the trace here and show what they did.", metavar="DIR")
    seed: int = option(0, "Of the token ids.", low=0)
    output_json: str | None = option(None, "Write figures, versions, device and command here.", metavar="FILE")


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """Which server `bench serve` measures, and how fast requests arrive."""

    url: str = option("http://127.0.0.1:3000", "The server.", metavar="URL")
    model: str | None = option(None, "Model name to ask for. Default: the first of /v1/models.", metavar="NAME")
    tokenizer: str | None = option(None, "Hub id, folder or .gguf file of the tokenizer. Default: the model's.", metavar="ID")
    api_key: str | None = option(None, "Sent as a bearer token.", metavar="KEY")
    request_rate: float = option(float("inf"), "Requests a second; inf sends all at once.", low=1e-6, metavar="X")
    burstiness: float = option(1.0, "Shape of the gamma distribution of the gaps: 1 is Poisson, less is burstier.", low=1e-3)
    max_concurrency: int | None = option(None, "Most requests at once; more wait on this side, their clocks not running.", low=1)
    temperature: float | None = option(None, "0 is greedy. Default: the server's.", low=0)
    ignore_eos: bool = option(False, "Generate the full output length.")
    num_warmups: int = option(0, "Requests before the clock starts, besides the one that tries the server.", low=0)
    output_json: str | None = option(None, "Write figures, versions, device and command here.", metavar="FILE")
