"""Putting a model's weights on a mesh: each tensor straight to its shards, never the whole model twice in host memory."""

import json
import logging
import math
from collections.abc import Generator, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxserve.config import ModelOptions
from jaxserve.errors import ModelNotFound, StartupError, UnsupportedModel
from jaxserve.models import Architecture, Model, ModelConfig
from jaxserve.models.formats import QuantizedMatrix, QuantizedPart, by_moments
from jaxserve.models.kv_scaling import KVScaling, is_kv_scale
from jaxserve.models.parameters import Parameter, Source
from jaxserve.pallas_kernels import ScaleDtype
from jaxserve.weights.checkpoint import HEAD, Checkpoint, check_tensors, embeddings_are_tied
from jaxserve.weights.compaction import compacted
from jaxserve.weights.dummy import DUMMY_BOUND, random_array
from jaxserve.weights.gguf_file import GGUFCheckpoint
from jaxserve.weights.input_moments import input_moments
from jaxserve.weights.magnitudes import Magnitudes
from jaxserve.weights.quantized import load_and_quantize, load_stored, random_matrix
from jaxserve.weights.read_ahead import read_ahead
from jaxserve.weights.safetensors_folder import SafetensorsCheckpoint
from jaxserve.weights.source import ModelSource

logger = logging.getLogger(__name__)

_SCALES = (".scales", ".weight_scale", ".weight_scale_inv")


@dataclass(frozen=True)
class OpenModel:
    """A model whose weights are not loaded yet.

    Attributes:
        architecture: what is to be loaded.
        dtype: of weights and activations.
        checkpoint: its files; None: weights are made up.
        dummy_bound: of the made-up ones.
    """

    architecture: Architecture
    dtype: jnp.dtype
    checkpoint: Checkpoint | None
    dummy_bound: float = DUMMY_BOUND

    def nbytes(self, shards: int) -> int:
        """Size of the weights on each of so many devices."""
        parameters = self.architecture.parameters
        return sum(math.prod(parameter.local_shape(shards)) * parameter.dtype(self.dtype, shards).itemsize for parameter in parameters)

    def load(self, mesh: Mesh) -> Model:
        """Put the weights on the devices of a mesh with an axis "tensor".

        Raises:
            WeightsError: a file cannot be read, or weights are infinite or not numbers; one line.
        """
        return Model(self.architecture, compacted(self._leaves(mesh)), self.dtype)

    def _leaves(self, mesh: Mesh) -> list[jax.Array]:
        parameters, checkpoint = self.architecture.parameters, self.checkpoint
        order = {name: i for i, name in enumerate(checkpoint.shapes if checkpoint else ())}
        by_file = sorted(parameters, key=lambda parameter: order.get(parameter.tensors[0].name, 0))
        # The parts of a quantized matrix come together.
        units = list(dict.fromkeys(parameter if isinstance(parameter, Parameter) else parameter.matrix for parameter in by_file))
        magnitudes = Magnitudes(mesh)
        moments = self._input_moments(magnitudes, mesh)
        arrays: dict[Parameter, jax.Array] = {}
        matrices: dict[QuantizedMatrix, dict[str, jax.Array]] = {}
        with closing(self._dense_arrays(units, mesh)) as dense:
            for unit in units:
                if isinstance(unit, Parameter):
                    arrays[unit] = self._kept(unit, next(dense), magnitudes)
                elif checkpoint is None:
                    matrices[unit] = random_matrix(unit, mesh, self.dummy_bound)
                elif unit.scheme.stored == "dense":
                    inputs = moments[unit.sources] if by_moments(unit.scheme.layout) else None
                    matrices[unit] = load_and_quantize(unit, self._kept(unit.dense, next(dense), magnitudes), inputs, mesh)
                else:
                    matrices[unit] = load_stored(unit, checkpoint, mesh)
        if checkpoint is not None:
            magnitudes.check(checkpoint, self.dtype, tied=self.architecture.config.tie_embeddings)
        return [
            arrays[parameter] if isinstance(parameter, Parameter) else matrices[parameter.matrix][parameter.name]
            for parameter in parameters
        ]

    def _dense_arrays(self, units: Iterable[Parameter | QuantizedMatrix], mesh: Mesh) -> Generator[jax.Array]:
        """Of the parameters among them, and of the matrices that are quantized here, as `_read` gives them."""
        dense: list[Parameter] = []
        for unit in units:
            if isinstance(unit, Parameter):
                dense.append(unit)
            elif self.checkpoint is not None and unit.scheme.stored == "dense":
                dense.append(unit.dense)
        read = partial(self._read, mesh=mesh)
        # Random arrays are made on the devices, by programs that threads would compile more than once.
        yield from map(read, dense) if self.checkpoint is None else read_ahead(read, dense)

    def _kept(self, parameter: Parameter, array: jax.Array, magnitudes: Magnitudes) -> jax.Array:
        """What `_read` gave, in the dtype that it is kept in."""
        return array if self.checkpoint is None else magnitudes.noted(parameter, array, parameter.dtype(self.dtype))

    def _read(self, parameter: Parameter, mesh: Mesh) -> jax.Array:
        # Rounded as all weights are, and then converted on the devices: bfloat16 to float16 takes a CPU core ten seconds for an 8B model.
        dtype = self.dtype if parameter.after_norm else parameter.dtype(self.dtype)
        checkpoint, shards, axis = self.checkpoint, mesh.shape["tensor"], parameter.sharded_axis
        if checkpoint is None:
            return random_array(parameter, mesh, dtype, self.dummy_bound, parameter.dtype(self.dtype))
        local = parameter.local_shape(shards)

        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            start = 0 if axis is None or index is None else index[axis].start or 0
            with np.errstate(over="ignore"):  # Magnitudes.check tells which tensor it is
                return parameter.read(checkpoint.read, 0 if axis is None else start // local[axis], shards, dtype)

        return jax.make_array_from_callback(parameter.shape(shards), NamedSharding(mesh, parameter.spec), shard)

    def _input_moments(self, magnitudes: Magnitudes, mesh: Mesh) -> dict[tuple[Source, ...], jax.Array]:
        """Of the matrices whose quantization on load asks for it."""
        schemes = self.architecture.config.quantization.schemes
        if self.checkpoint is None or not any(scheme.stored == "dense" and by_moments(scheme.layout) for scheme in schemes):
            return {}

        def load(parameter: Parameter) -> jax.Array:
            return self._kept(parameter, self._read(parameter, mesh), magnitudes)

        return input_moments(self.architecture.config, load, mesh, self.dtype)


def open_model(
    source: ModelSource,
    options: ModelOptions,
    mesh: Mesh,
    dtype: jnp.dtype | None = None,
    attention: str = "auto",
    kv_dtype: str | None = None,
) -> OpenModel:
    """Read what a model is; check that the mesh can share it and that its tensors are there (`--load-format dummy` needs none).

    Args:
        dtype: of weights and activations; None: what `options.dtype` says (`resolve_dtype`).
        attention: which kernels compute it (`Decoder`).
        kv_dtype: of keys and values in the cache; None: as `Model.kv_dtype` says. float8_e4m3fn uses the scales of the checkpoint.

    Raises:
        StartupError: UnsupportedModel, WeightsError, or a mesh that cannot share the model; one line each.
    """
    config = read_config(source)
    dtype = jnp.dtype(dtype or resolve_dtype(options.dtype, config, mesh.devices.flat[0].platform))
    if options.load_format == "dummy":
        architecture = Architecture.of(config, attention)
        _check_mesh(architecture, mesh.shape["tensor"])
        return OpenModel(architecture, dtype, None)
    checkpoint = _open_gguf(source.path) if source.is_gguf else SafetensorsCheckpoint(source.weights or source.path)
    tied = config.tie_embeddings and embeddings_are_tied(checkpoint)
    quantization = config.quantization.with_scales(_scale_dtype(checkpoint))
    config = replace(
        config, tie_embeddings=tied, quantization=quantization, kv_scaling=_kv_scaling(config.kv_scaling, checkpoint, kv_dtype)
    )
    architecture = Architecture.of(config, attention)
    _check_mesh(architecture, mesh.shape["tensor"])
    check_tensors(architecture.parameters, checkpoint, ignored={HEAD} if tied else set())
    return OpenModel(architecture, dtype, checkpoint)


def _kv_scaling(scaling: KVScaling, checkpoint: Checkpoint, kv_dtype: str | None) -> KVScaling:
    """Those of the checkpoint, where the cache is of the dtype that they are made for: float8_e5m2 reaches far enough without."""
    if kv_dtype == "float8_e4m3fn":
        scaling = scaling.found_in(checkpoint.shapes)
        told = f"divided by {' and '.join(dict.fromkeys(scaling.names))}" if scaling.names else "as they are: the checkpoint has no scales"
        logger.info("keys and values are stored as float8_e4m3fn, %s", told)
    elif kv_dtype is None and any(map(is_kv_scale, checkpoint.shapes)):
        logger.info("the checkpoint has scales for a KV cache of 8 bits, which --kv-cache-dtype fp8_e4m3fn would use")
    return scaling


def _open_gguf(path: Path) -> Checkpoint:
    checkpoint = GGUFCheckpoint(path)
    if kinds := checkpoint.dequantized:
        logger.info("%s: matrices of type %s are dequantized as they are loaded", path.name, ", ".join(kinds))
    return checkpoint


def load_model(source: ModelSource, options: ModelOptions, mesh: Mesh, dtype: jnp.dtype | None = None) -> Model:
    """`open_model` and load it.

    Raises:
        StartupError: one line.
    """
    return open_model(source, options, mesh, dtype).load(mesh)


def read_config(source: ModelSource) -> ModelConfig:
    """The model's shape, without its weights.

    Raises:
        ModelNotFound: no config.json.
        UnsupportedModel: see `ModelConfig.from_hf`.
    """
    if source.is_gguf:
        checkpoint = GGUFCheckpoint(source.path)
        return ModelConfig.from_hf(_scaled(checkpoint.config, source), checkpoint.generation_config, source.quantize)
    config = _read_json(source.path / "config.json")
    if config is None:
        raise ModelNotFound(f"{source.path} has no config.json")
    if not any(config.get(name) for name in ("quantization_config", "compression_config")):  # null or absent
        config = {**config, **_quantization_beside(source.path)}
    config = _scaled(config, source)
    return ModelConfig.from_hf(config, _read_json(source.path / "generation_config.json"), source.quantize)


def _quantization_beside(folder: Path) -> Mapping[str, Any]:
    """The quantization_config of older checkpoints of AutoGPTQ, AutoAWQ and ModelOpt, which have it in a file of its own."""
    for file, method in (("quantize_config.json", "gptq"), ("quant_config.json", "awq"), ("hf_quant_config.json", "modelopt")):
        if (declared := _read_json(folder / file)) is not None:
            return {"quantization_config": {"quant_method": method, **declared}}
    return {}


def _scaled(config: Mapping[str, Any], source: ModelSource) -> Mapping[str, Any]:
    """config.json with the rope scaling that the user asked for."""
    if source.rope_scaling is None:
        return config
    kind, factor = source.rope_scaling
    rest = {name: value for name, value in config.items() if name not in ("rope_parameters", "rope_scaling")}
    theta = (config.get("rope_parameters") or {}).get("rope_theta")
    kept = {} if theta is None else {"rope_theta": theta}
    return {**rest, **kept, "rope_scaling": {"rope_type": kind, "factor": factor}}


def resolve_dtype(name: str, config: ModelConfig, platform: str) -> jnp.dtype:
    """What `--dtype` means: auto is float32 on the CPU, where bfloat16 products are 6 times slower, else the checkpoint's dtype."""
    if name != "auto":
        return jnp.dtype(name)
    if platform == "cpu":
        return jnp.dtype(jnp.float32)
    return jnp.dtype(config.dtype if config.dtype in ("float16", "bfloat16") else jnp.bfloat16)


def _scale_dtype(checkpoint: Checkpoint) -> ScaleDtype:
    """In which dtype the scales of a checkpoint are kept: the one that loses nothing."""
    dtypes = {checkpoint.dtypes[name] for name in checkpoint.dtypes if name.endswith(_SCALES)}
    if len(dtypes) != 1:
        return "float32"
    return "float16" if dtypes == {"F16"} else "bfloat16" if dtypes == {"BF16"} else "float32"


def _read_json(path: Path) -> Mapping[str, Any] | None:
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise UnsupportedModel(f"{path} is not readable JSON") from None
    if not isinstance(values, dict):
        raise UnsupportedModel(f"{path} does not hold a JSON object")
    return values


def _check_mesh(architecture: Architecture, shards: int) -> None:
    for parameter in architecture.parameters:
        for source in parameter.sources:
            for axis in source.axes:
                if not axis.divides(shards):
                    raise StartupError(f"{shards} devices cannot share this model's {axis.units} {axis.name} evenly")
        if isinstance(parameter, QuantizedPart):
            parameter.matrix.check_shards(shards)
