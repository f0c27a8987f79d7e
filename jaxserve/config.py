"""Every setting of jaxserve, declared once.

Four frozen dataclasses, split by who reads them. A field's metadata carries its help text; the command line makes the
flag from the field's name (`max_batch_size` -> `--max-batch-size`) and the environment variable too (`MAX_BATCH_SIZE`).
Flags keep TGI's names and meaning where TGI has the flag. Nothing writes to a config after it is made.
"""

import math
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from jaxserve.errors import StartupError

EXECUTABLES_FOLDER = "executables"
"""Of compiled programs that are loaded as they are, in the compilation cache's."""
LOWERED_FOLDER = "lowered"
"""Of lowered programs, in the compilation cache's."""


def option(
    default: Any, help: str, choices: tuple[str, ...] = (), metavar: str = "", low: float | None = None, high: float | None = None
) -> Any:
    """A dataclass field that the command line can make a flag from; `low` and `high` are inclusive bounds, see `check`."""
    return field(default=default, metadata={"help": help, "choices": choices, "metavar": metavar, "low": low, "high": high})


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """Which model, and how its weights are read."""

    model_id: str | None = option(
        None, "Hub id, local folder or .gguf file, also ORG/NAME/FILE.gguf. Default: the demo model, SmolLM2-135M-Instruct.", metavar="ID"
    )
    revision: str | None = option(None, "Branch, tag or commit of a hub id.")
    dtype: str = option(
        "auto",
        "Dtype of weights and activations; auto: float32 on CPU, the checkpoint's on a GPU.",
        ("auto", "float32", "float16", "bfloat16"),
    )
    load_format: str = option("auto", "dummy: random weights of the model's shape, for benchmarks.", ("auto", "dummy"))
    quantize: str | None = option(
        None,
        "Quantize the weights of matrices while they are loaded; awq, gptq, marlin and compressed-tensors take the checkpoint's.",
        ("awq", "bitsandbytes", "bitsandbytes-fp4", "bitsandbytes-nf4", "compressed-tensors", "eetq", "fp8", "gptq", "marlin"),
    )
    rope_scaling: str | None = option(None, "Rope scaling in place of the model's own; needs --rope-factor.", ("linear", "dynamic"))
    rope_factor: float | None = option(None, "How many times longer --rope-scaling makes the context.", low=1.0)
    weights_cache_override: str | None = option(
        None, "Folder with the weights of --model-id, whose other files come from the hub.", metavar="DIR"
    )
    tokenizer_config_path: str | None = option(None, "A tokenizer_config.json whose chat template replaces the model's.", metavar="PATH")


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How the engine runs: devices, memory, scheduling."""

    mesh: str = option("1x1", "Data x tensor parallel, e.g. 1x4. The engine replicas are the first number.", metavar="DxT")
    page_size: int = option(16, "Tokens a KV page.", low=1)
    attention: str = option(
        "auto",
        "Kernels that compute attention; auto: the fastest for each step that the device has.",
        ("auto", "mosaic", "triton", "xla"),
    )
    kv_cache_dtype: str = option(
        "auto",
        "Dtype of the KV cache; auto: that of the activations, float16 for bfloat16; fp8 and fp8_e4m3 are fp8_e4m3fn.",
        ("auto", "fp8", "fp8_e4m3", "fp8_e4m3fn", "fp8_e5m2"),
    )
    cuda_memory_fraction: float = option(0.9, "Share of a GPU's memory that jaxserve may use.", low=0.01, high=1.0)
    cpu_kv_cache_gib: float = option(2.0, "Memory for the KV cache when serving on the CPU, in GiB.", low=0.00001)
    max_batch_size: int | None = option(None, "Most requests that run at once. Default: 32 on CPU, 256 on a GPU.", low=1)
    max_batch_prefill_tokens: int | None = option(None, "Most tokens a step computes. Default: 512 on CPU, 8192 on a GPU.", low=1)
    max_input_tokens: int | None = option(None, "Most prompt tokens of a request. Default: max-total-tokens - 1.", low=1)
    max_total_tokens: int | None = option(
        None, "Most prompt plus output tokens of a request. Default: what the model and the cache hold.", low=2
    )
    max_decode_gap_ms: float | None = option(
        None, "Longest gap a running stream should see while prompts are computed.", metavar="MS", low=0.1
    )
    max_concurrent_requests: int = option(1024, "Accepted requests, running and waiting; above it the answer is 429.", low=1)
    prefix_caching: bool = option(True, "Share the KV pages of equal prompt prefixes.")
    disable_grammar_support: bool = option(False, "Refuse requests with a grammar, and compile nothing for them.")
    deterministic: bool = option(
        False, "The same tokens and log probabilities to the bit, whatever else runs, at some cost in speed; every step is of one size."
    )
    disable_custom_all_reduce: bool = option(
        False, "Add up over GPUs by XLA's collectives alone, not by a kernel that reads the other GPUs' memory."
    )
    sync: bool = option(False, "Collect every step at once instead of one step later; same tokens, slower.")
    compilation_cache_dir: str | None = option(None, "Folder of compiled programs. Default: ~/.cache/jaxserve/xla.", metavar="DIR")

    @property
    def kv_dtype(self) -> str | None:
        """What --kv-cache-dtype is to JAX; None: the dtype of the activations."""
        if self.kv_cache_dtype == "auto":
            return None
        return "float8_e5m2" if self.kv_cache_dtype == "fp8_e5m2" else "float8_e4m3fn"

    @property
    def compilation_cache(self) -> Path:
        """The folder of compiled programs."""
        return Path(self.compilation_cache_dir or cache_folder() / "xla")

    @property
    def data_size(self) -> int:
        """Engine replicas."""
        return parse_mesh(self.mesh)[0]

    @property
    def tensor_size(self) -> int:
        """Devices a replica."""
        return parse_mesh(self.mesh)[1]


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """What the HTTP front end listens on, accepts and promises."""

    hostname: str = option("0.0.0.0", "Address to listen on.")
    port: int = option(3000, "Port to listen on.", low=0, high=65535)
    http_workers: int | None = option(
        None, "HTTP processes sharing the port. Default: one for two engine replicas, as far as there are cores beside them.", low=1
    )
    served_model_name: str | None = option(None, "Model name in answers. Default: the model id.", metavar="NAME")
    api_key: str | None = option(None, "Clients must send it as a bearer token.", metavar="KEY")
    cors_allow_origin: tuple[str, ...] = option((), "Allowed browser origin; may be repeated. Default: any.", metavar="ORIGIN")
    payload_limit: int = option(2_000_000, "Most bytes of a request body.", metavar="BYTES", low=1)
    watermark_gamma: float = option(0.5, "Share of the vocabulary that a watermark favours after each token.", low=0.0, high=1.0)
    watermark_delta: float = option(2.0, "What a watermark adds to the logits of the tokens that it favours.", low=0.0, high=100.0)
    max_best_of: int = option(2, "Most `best_of` of a request.", low=1)
    max_stop_sequences: int = option(16, "Most stop strings of a request.", low=0)
    max_top_n_tokens: int = option(20, "Most `top_n_tokens` and `top_logprobs` of a request.", low=0)
    max_client_batch_size: int = option(32, "Most prompts of one /v1/completions request.", low=1)
    tool_call_parser: str = option(
        "auto",
        "How the model writes tool calls; auto: by its chat template.",
        ("auto", "none", "hermes", "qwen", "llama3_json", "pythonic", "mistral"),
    )
    reasoning_parser: str = option(
        "auto", "How the model writes its reasoning; auto: by its chat template.", ("auto", "none", "qwen3", "deepseek_r1")
    )
    graceful_termination_timeout: int = option(90, "Seconds that running requests may take after SIGTERM.", metavar="SECONDS", low=0)
    json_output: bool = option(False, "Log in JSON lines.")
    log_level: str = option("info", "Least severe lines that are logged.", ("debug", "info", "warning", "error"))
    otlp_endpoint: str | None = option(None, "Collector that is sent a trace of each request, by OTLP over gRPC.", metavar="URL")
    otlp_service_name: str = option("jaxserve", "Name of this server in traces.", metavar="NAME")
    prometheus_port: int | None = option(None, "A second port for /metrics alone. It is at the HTTP port anyway.", low=0, high=65535)
    validation_workers: int = option(2, "Threads of an HTTP process that tokenize.", low=1, high=64)
    tgi_strict: bool = option(False, "Do what TGI does where jaxserve does better, see docs/tgi.md.")


@dataclass(frozen=True, slots=True)
class HostOptions:
    """The hosts that serve together, one replica or several. `hosts.discover` fills in what Kubernetes or Slurm know."""

    coordinator: str | None = option(None, "Address of host 0 on the cluster's network. PORT+1 may be taken too.", metavar="HOST:PORT")
    num_hosts: int | None = option(
        None, "Hosts that share the replicas, or one. Default: as LeaderWorkerSet or Slurm say, else 1.", low=1, high=4096
    )
    host_index: int | None = option(None, "Which of them this is, from 0 on. Host 0 serves HTTP.", metavar="I", low=0)
    cluster_secret: str | None = option(
        None, "All hosts must know it; better given as variable CLUSTER_SECRET. Needed but on loopback.", metavar="SECRET"
    )

    @property
    def span_hosts(self) -> bool:
        """Whether there are other hosts."""
        return (self.num_hosts or 1) > 1

    @property
    def leads(self) -> bool:
        """Whether this is host 0: that serves HTTP, and of the hosts of one replica the one that schedules."""
        return not self.host_index


def cache_folder() -> Path:
    """Where jaxserve keeps what it can make or fetch again: JAXSERVE_CACHE, else jaxserve/ in XDG_CACHE_HOME, else in ~/.cache."""
    if own := os.environ.get("JAXSERVE_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxserve"


def limit_gpu_memory(options: EngineOptions) -> None:
    """Tell JAX its share of a GPU; heeded only before the process has used one. A user's own variable goes before the flag."""
    if not {"XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"} & os.environ.keys():
        os.environ["XLA_CLIENT_MEM_FRACTION"] = str(options.cuda_memory_fraction)


def parse_mesh(text: str) -> tuple[int, int]:
    """Read "DxT".

    Returns:
        (data, tensor), both at least 1.

    Raises:
        StartupError: for anything else.
    """
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(p.isascii() and p.isdigit() and int(p) >= 1 for p in parts):
        raise StartupError(f"--mesh must be DxT with two positive numbers, e.g. 1x4. Given: {text}")
    return int(parts[0]), int(parts[1])


def check(options: Any) -> None:
    """Hold every field of an options dataclass against the choices and bounds it was declared with.

    Raises:
        StartupError: naming the flag of the first field that is out of them.
    """
    for declared in fields(options):
        value, meta = getattr(options, declared.name), declared.metadata
        flag = "--" + declared.name.replace("_", "-")
        if value is None or not meta:
            continue
        if meta["choices"] and value not in meta["choices"]:
            raise StartupError(f"{flag} must be one of {', '.join(meta['choices'])}. Given: {value}")
        low, high = meta["low"], meta["high"]
        if (low is not None or high is not None) and not isinstance(value, int | float):
            raise StartupError(f"{flag} must be a number. Given: {value!r}")
        if (low is not None or high is not None) and not math.isfinite(value) and value != declared.default:
            raise StartupError(f"{flag} must be a finite number. Given: {value}")
        if low is not None and value < low:
            raise StartupError(f"{flag} must be at least {low:g}. Given: {value:g}")
        if high is not None and value > high:
            raise StartupError(f"{flag} must be at most {high:g}. Given: {value:g}")
