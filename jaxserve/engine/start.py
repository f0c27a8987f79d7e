"""The start of a host: from options to files, a mesh, and programs that are being prepared; then its weights.

Where a mesh spans hosts, all of them start alike, and hold on the way what they were told against each other.
"""

import logging
import re
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxserve.config import EngineOptions, ModelOptions, limit_gpu_memory
from jaxserve.errors import DeviceError, StartupError
from jaxserve.hosts.agreement import FLAGS, agree, flag_facts
from jaxserve.lowering_processes import LoweringProcesses
from jaxserve.models import Model, check_attention
from jaxserve.runner import Executor, Hosts, Preparation, RunnerConfig, code_versions, make_mesh, peak_memory, start_jax
from jaxserve.weights import ModelSource, resolve_model
from jaxserve.weights.fingerprint import fingerprint
from jaxserve.weights.loader import OpenModel, open_model, read_config, resolve_dtype

logger = logging.getLogger(__name__)


type Found = Callable[[Path, Callable[[], str]], None]


@dataclass(frozen=True)
class Start:
    """A start that has begun.

    Attributes:
        source: the model's files.
        mesh: the devices.
        opened: the model, without its weights.
        config: of the runner.
        preparation: of the programs; to be closed.
    """

    source: ModelSource
    mesh: Mesh
    opened: OpenModel
    config: RunnerConfig
    preparation: Preparation

    def load(self) -> Model:
        """Load the weights, of which each host reads what its own devices hold."""
        begin = time.monotonic()
        model = self.opened.load(self.mesh)
        told = model.config.quantization.description or model.dtype, time.monotonic() - begin, peak_memory(self.mesh)
        logger.info("%.2f GiB of weights, %s, after %.1f s; held at most: %s", model.nbytes / 2**30, *told)
        return model


def begin_start(
    model_options: ModelOptions,
    engine_options: EngineOptions,
    replica: int,
    source: ModelSource | None,
    hosts: Hosts | None,
    found: Found | None = None,
    processes: LoweringProcesses | None = None,
) -> Start:
    """Find the model and the devices, and begin to prepare the programs.

    Args:
        replica, source, hosts, found, processes: as for build_engine(); of these hosts this one may be any.

    Raises:
        StartupError: one line says why.
    """
    _check_deterministic(engine_options)
    if hosts is not None:
        agree(hosts, FLAGS, flag_facts(model_options, engine_options))
    source = source or resolve_model(model_options)

    def files() -> str:
        return fingerprint(source, with_weights=model_options.load_format != "dummy")

    if found is not None:
        found(source.path, files)
    limit_gpu_memory(engine_options)
    if hosts is not None:
        agree(hosts, "code", {**code_versions(), "the model's files": files()})
        start_jax(hosts)
        agree(hosts, "devices", {"the kind of devices": jax.local_devices()[0].device_kind})
    mesh = make_mesh(engine_options.tensor_size, replica, num_hosts=1 if hosts is None else hosts.count)
    platform = mesh.devices.flat[0].platform
    logger.info("devices: %d x %s", mesh.size, mesh.devices.flat[0].device_kind)
    attention, kv_dtype = engine_options.attention, engine_options.kv_dtype
    _check_gpu(kv_dtype, mesh)
    if attention != "auto":  # before the weights, which take long
        shape = read_config(source)
        dtype, of_cache = resolve_dtype(model_options.dtype, shape, platform), None if kv_dtype is None else jnp.dtype(kv_dtype)
        check_attention(shape, attention, dtype, of_cache, engine_options.page_size, engine_options.tensor_size)
    opened = open_model(source, model_options, mesh, attention=attention, kv_dtype=kv_dtype)
    config = RunnerConfig.from_options(engine_options, platform, str(engine_options.compilation_cache))
    nbytes = opened.nbytes(engine_options.tensor_size)
    preparation = Preparation(opened.architecture, opened.dtype, mesh, config, weights_to_come=nbytes, hosts=hosts, processes=processes)
    if engine_options.deterministic and engine_options.max_decode_gap_ms is not None and len(preparation.buckets.step_sizes) == 1:
        preparation.close()
        raise StartupError(
            "--max-decode-gap-ms does nothing under --deterministic where this device computes this model: its steps all take as long. "
            "Set --max-batch-prefill-tokens"
        )
    return Start(source, mesh, opened, config, preparation)


def build_worker(model_options: ModelOptions, engine_options: EngineOptions, hosts: Hosts) -> Executor:
    """Make a host ready to replay what the engine of host 0 runs.

    Raises:
        StartupError: one line says why.
    """
    start = begin_start(model_options, engine_options, 0, None, hosts)
    with closing(start.preparation) as preparation:
        executor = Executor(start.load(), start.mesh, start.config, preparation, hosts)
        executor.warmup()
    return executor


def _check_deterministic(options: EngineOptions) -> None:
    """Refuse what --deterministic cannot go with.

    Raises:
        StartupError: naming the other flag.
    """
    if not options.deterministic:
        return
    if options.attention == "mosaic":
        raise StartupError(
            "--deterministic needs its own attention kernel, of Triton: --attention must be auto, triton or xla. Given: mosaic"
        )


def _check_gpu(kv_dtype: str | None, mesh: Mesh) -> None:
    """Whether the GPU, if it is one, runs Triton's kernels, which are in every step, and converts from and to the dtype of the cache.

    Raises:
        StartupError: naming what does.
    """
    device = mesh.devices.flat[0]
    told = str(getattr(device, "compute_capability", ""))
    if not re.fullmatch(r"\d+\.\d+", told):
        return
    capability = tuple(map(int, told.split(".")))
    if capability < (8, 0):
        raise DeviceError(
            f"{device.device_kind} is a GPU of compute capability {told}, and 8.0 or later is needed; JAX_PLATFORMS=cpu serves on the CPU"
        )
    if kv_dtype == "float8_e4m3fn" and capability < (8, 9):
        raise StartupError(
            f"--kv-cache-dtype fp8_e4m3fn needs a GPU of compute capability 8.9 or later, this one is of {told}; fp8_e5m2 serves it"
        )
