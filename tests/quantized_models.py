"""Tiny checkpoints with quantized matrices of random codes, and models made dense again."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding
from safetensors.numpy import save_file
from tiny_models import CONFIGS, make_tensors, write_tokenizer

from jaxserve.models import Architecture, Model, ModelConfig
from jaxserve.models.formats import Quantization, QuantizedMatrix, QuantizedPart
from jaxserve.models.formats.bitsandbytes import BitsAndBytesStorage
from jaxserve.models.formats.storages import STORAGES
from jaxserve.models.parameters import Parameter, Stored
from jaxserve.pallas_kernels import TABLES, weight_of

_DTYPES = {"I32": np.int32, "I8": np.int8, "U8": np.uint8, "F32": np.float32, "F64": np.float32}


def write_quantized(folder: Path, quantization_config: Mapping[str, Any], **shape: int) -> Path:
    """A tiny checkpoint of one layer whose matrices are quantized as a quantization_config says, in groups that suit sizes of 64 and 96.

    Args:
        shape: other fields of its config.json, where groups suit other sizes.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {**CONFIGS["llama"], "num_hidden_layers": 1, "quantization_config": dict(quantization_config), **shape}
    quantization = ModelConfig.from_hf(config).quantization
    random = np.random.default_rng(0)
    tensors: dict[str, np.ndarray] = {}
    for key, tensor in make_tensors(config, 7).items():
        module = key.removesuffix(".weight")
        scheme = quantization.scheme(module) if key.endswith(".weight") else None
        if scheme is None:
            tensors[key] = tensor
            continue
        storage = STORAGES[scheme.stored]
        for stored in storage.tensors(scheme, module, *tensor.shape):
            if not stored.optional:
                tensors[stored.name] = _random(random, stored, scheme.layout, float(tensor.std()))
        if isinstance(storage, BitsAndBytesStorage):
            state = {"blocksize": 64, "shape": list(tensor.shape), "nested_blocksize": 256, "nested_offset": 0.02}
            kind = scheme.layout.code
            tensors[f"{key}.quant_state.bitsandbytes__{kind}"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
            tensors[f"{key}.quant_map"] = np.asarray(TABLES[kind])
        if not scheme.ordered:
            name = next(stored.name for stored in storage.tensors(scheme, module, *tensor.shape) if stored.name.endswith("g_idx"))
            tensors[name] = random.permutation(np.arange(tensor.shape[1], dtype=np.int32) // scheme.group)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(folder)
    return folder


def _random(random: np.random.Generator, stored: Stored, layout: Any, deviation: float) -> np.ndarray:
    """A tensor that makes weights of about this deviation."""
    shape, kind = stored.shape or (1,), stored.dtypes[0]
    if kind == "F8_E4M3":
        return (random.standard_normal(shape) * 60).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn)
    if kind == "F64":
        steps = {"int4": 4.6, "int8": 73, "fp8": 60, "nf4": 0.6, "fp4": 0.5, "e2m1": 3}[layout.code]
        factor = 127 if stored.name.endswith("SCB") else 1
        return (random.uniform(0.7, 1.3, shape) * deviation / steps * factor).astype(np.float16 if "scales" in stored.name else np.float32)
    if kind == "F32":
        return random.uniform(0.05, 0.1, shape).astype(np.float32)
    if stored.name.endswith("qzeros") and layout.correction == "none":
        return np.full(shape, 0x77777777 if layout.bits == 4 else 0x7F7F7F7F, np.int32)
    if kind == "U8" and "scale" in stored.name:
        return random.integers(120, 124, shape, np.uint8)
    data = np.frombuffer(random.bytes(int(np.prod(shape)) * np.dtype(_DTYPES[kind]).itemsize), _DTYPES[kind])
    return data.reshape(shape)


def dense_leaves(model: Model, mesh: Mesh) -> dict[str, jax.Array]:
    """Arrays by the name of their first source, as if nothing was quantized."""
    leaves: dict[str, jax.Array] = {}
    arrays: dict[QuantizedMatrix, dict[str, jax.Array]] = {}
    for parameter, leaf in zip(model.architecture.parameters, model.leaves, strict=True):
        if isinstance(parameter, Parameter):
            leaves[parameter.sources[0].name] = leaf
        else:
            arrays.setdefault(parameter.matrix, {})[parameter.name] = leaf
    return leaves | {matrix.sources[0].name: _dense(matrix, of, mesh) for matrix, of in arrays.items()}


def _dense(matrix: QuantizedMatrix, arrays: dict[str, jax.Array], mesh: Mesh) -> jax.Array:
    """The matrix as `matrix.dense` declares it; with columns of no order, on one device alone."""
    k, layout = matrix.local_size(mesh.shape["tensor"])[1], matrix.scheme.layout

    def dequantize(arrays: dict[str, jax.Array]) -> jax.Array:
        permutation = arrays.get("permutation")
        found = weight_of(arrays, layout, k).dequantize(jnp.float32)
        return found if permutation is None else jnp.zeros_like(found).at[:, permutation].set(found)

    part: QuantizedPart = next(iter(matrix.parts().values()))
    whole = jax.shard_map(dequantize, mesh=mesh, in_specs=part.spec, out_specs=matrix.dense.spec, check_vma=False)
    return jax.jit(whole, compiler_options={"xla_backend_optimization_level": 0})(arrays)  # compiles in two thirds of the time


def made_dense(model: Model, mesh: Mesh) -> Model:
    """The same model with nothing quantized, on the mesh that it is on."""
    config = dataclasses.replace(model.config, quantization=Quantization())
    architecture = Architecture.of(config)
    leaves = dense_leaves(model, mesh)
    shards = mesh.shape["tensor"]

    def leaf(parameter: Any) -> jax.Array:
        first = leaves[parameter.sources[0].name]
        place = NamedSharding(mesh, parameter.spec)
        if first.shape == parameter.shape(shards):
            return jax.device_put(first, place)
        assert shards == 1, "rows of several matrices are interleaved shard by shard"
        # Matrices that are kept in different ways lie apart.
        return jax.device_put(jnp.concatenate([leaves[source.name] for source in parameter.sources]), place)

    return Model(architecture, tuple(map(leaf, architecture.parameters)), model.dtype)
