"""Blueprint: all that decides a runner's programs, in a form that travels to other processes and is hashed into the names of files."""

import dataclasses
import functools
import hashlib
import json
import platform
import types
import typing
from dataclasses import dataclass
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from jax import export
from jax._src.pallas.triton.gpu_info import gpu_version_from_device_kind
from jax.sharding import AbstractDevice, AbstractMesh, Mesh

from jaxserve.models import Architecture, ModelConfig
from jaxserve.runner.config import RunnerConfig
from jaxserve.runner.exchange import reach_each_other
from jaxserve.runner.kv_cache import KVCachePlan

# What of JAX's configuration changes a trace.
TRACE_OPTIONS = ("jax_enable_x64", "jax_default_matmul_precision", "jax_numpy_dtype_promotion", "jax_numpy_rank_promotion")

# A GPU of each compute capability that Pallas-Triton knows by its name. For others, an L40S or an A10G, it lowers only where one is.
KNOWN_GPUS = {
    "8.0": "NVIDIA A100",
    "8.6": "NVIDIA A10",
    "8.9": "NVIDIA L4",
    "9.0": "NVIDIA H100",
    "10.0": "NVIDIA B200",
    "10.3": "NVIDIA B300",
    "11.0": "NVIDIA Thor",
    "12.0": "NVIDIA RTX PRO 6000",
    "12.1": "NVIDIA GB10",
}


@dataclass(frozen=True)
class Blueprint:
    """A value: equal blueprints, equal programs.

    Attributes:
        model: its shape.
        attention: which kernels compute it.
        dtype: of weights and activations.
        tensor_size: devices a replica.
        device_kind: of each device, as JAX calls it, or one of the same compute capability that can be lowered for anywhere.
        num_cores, device_platform: likewise of each device; num_cores is None where JAX tells none.
        platform: what is compiled for: "cpu", "cuda".
        plan: sizes of the KV cache.
        num_slots: samples that run at once.
        max_batch_tokens: most tokens a step computes.
        masked: with the programs that constrained requests need.
        deterministic: as in RunnerConfig.
        common_tokens: likewise, a number.
        peer_memory: the devices add up over each other's memory.
        trace_options: (name, value) of TRACE_OPTIONS.
    """

    model: ModelConfig
    attention: str
    dtype: str
    tensor_size: int
    device_kind: str
    num_cores: int | None
    device_platform: str
    platform: str
    plan: KVCachePlan
    num_slots: int
    max_batch_tokens: int
    masked: bool
    deterministic: bool
    common_tokens: int
    peer_memory: bool
    trace_options: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, architecture: Architecture, dtype: Any, mesh: Mesh, plan: KVCachePlan, config: RunnerConfig) -> "Blueprint":
        """The blueprint of a runner on these devices."""
        device = mesh.abstract_mesh.abstract_device
        return cls(
            model=architecture.config,
            attention=architecture.attention,
            dtype=str(dtype),
            tensor_size=mesh.shape["tensor"],
            device_kind=lowered_kind(mesh.devices.flat[0]),
            num_cores=device.num_cores,
            device_platform=device.platform,
            platform=export.default_export_platform(),
            plan=plan,
            num_slots=config.max_batch_size,
            max_batch_tokens=config.max_batch_tokens,
            masked=config.masked,
            deterministic=config.deterministic,
            common_tokens=config.common_tokens or config.max_batch_tokens,
            peer_memory=config.peer_memory and reach_each_other(mesh),
            trace_options=tuple((name, _plain(getattr(jax.config, name))) for name in TRACE_OPTIONS),
        )

    @property
    def mesh(self) -> AbstractMesh:
        """The mesh without its devices; kernels are chosen by the device that it describes."""
        device = AbstractDevice(self.device_kind, self.num_cores, self.device_platform)
        return AbstractMesh((1, self.tensor_size), ("data", "tensor"), abstract_device=device)

    def to_json(self) -> str:
        """One line."""
        return self._json

    @functools.cached_property
    def _json(self) -> str:
        return json.dumps(dataclasses.asdict(self), default=str)  # a dtype becomes its name

    @staticmethod
    def from_json(text: str) -> "Blueprint":
        """Read what to_json() wrote."""
        return _read(Blueprint, json.loads(text))

    def digest(self, name: str) -> str:
        """A name for what this version of jaxserve, on this version of JAX, makes of the blueprint: 64 hexadecimal digits."""
        return hashlib.sha256("\n".join((_versions(), self.to_json(), name)).encode()).hexdigest()


def lowered_kind(device: Any) -> str:
    """The kind of one of JAX's devices by which programs are lowered for it, in processes without one too."""
    kind: str = device.device_kind
    if device.platform != "gpu" or gpu_version_from_device_kind(kind) is not None:
        return kind
    return KNOWN_GPUS.get(str(getattr(device, "compute_capability", "")), kind)


def code_versions() -> dict[str, str]:
    """By their names, the versions of all code that has a part in lowering."""
    sources = digest_sources(Path(__file__).parents[1])
    versions = {"the version of JAX": jax.__version__, "the version of jaxlib": version("jaxlib")}
    return {**versions, "the version of Python": platform.python_version(), "jaxserve's own code": sources}


def digest_sources(package: Path) -> str:
    """A digest of jaxserve's code that has a part in lowering: what the runner may import, see tests/test_imports.py."""
    sources = hashlib.sha256()
    for part in ("runner", "models", "pallas_kernels", "weights", "."):
        for path in sorted((package / part).glob("*.py" if part == "." else "**/*.py")):
            sources.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes() + b"\0")
    return sources.hexdigest()


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value


def _read(kind: Any, value: Any) -> Any:
    """A value of a type annotation from what JSON made of it."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        hints = typing.get_type_hints(kind)
        return kind(**{field.name: _read(hints[field.name], value[field.name]) for field in dataclasses.fields(kind)})
    if isinstance(kind, types.UnionType) and value is not None:
        return _read(typing.get_args(kind)[0], value)
    if kind is jax.numpy.dtype:
        return jax.numpy.dtype(value)
    if typing.get_origin(kind) is tuple and value is not None:
        kinds = typing.get_args(kind)
        return tuple(map(_read, kinds[:1] * len(value) if kinds[-1] is ... else kinds, value))
    return value


@functools.cache
def _versions() -> str:
    """Of all code that has a part in lowering."""
    return json.dumps(list(code_versions().values()))
