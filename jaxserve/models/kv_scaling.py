"""How keys and values are scaled before a KV cache of 8 bits takes them, as checkpoints say it."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxserve.errors import UnsupportedModel, WeightsError
from jaxserve.models.fields import Fields
from jaxserve.models.parameters import Parameter, Read, Stored

# Tensors of a layer with the scales of its keys and of its values. Those of compressed-tensors and Hugging Face; as vLLM calls its own
# modules; ModelOpt's; what older compressed-tensors and AutoFP8 wrote, and Quark; AutoFP8's first, one for both.
NAMES = (
    ("self_attn.k_scale", "self_attn.v_scale"),
    ("self_attn.attn.k_scale", "self_attn.attn.v_scale"),
    ("self_attn.k_proj.k_scale", "self_attn.v_proj.v_scale"),
    ("self_attn.k_proj.output_scale", "self_attn.v_proj.output_scale"),
    ("self_attn.kv_scale", "self_attn.kv_scale"),
)
# What else stands beside them: scales of queries and probabilities, which are never rounded here.
_UNUSED = (
    "self_attn.q_scale",
    "self_attn.attn.q_scale",
    "self_attn.q_proj.q_scale",
    "self_attn.q_proj.output_scale",
    "self_attn.prob_scale",
)
# AutoFP8 gives a layer whose values are all zero 1e-12 / 448. Numbers of 448 times the other bound are beyond float16 and any model;
# from there on queries that a scale has multiplied overflow, and below the first nothing but e4m3's largest number would be stored.
_LEAST, _MOST = 1e-16, 1e6
_LAYER = r"model\.layers\.\d+\."
_ANY = re.compile(_LAYER + f"({'|'.join(re.escape(name) for name in {*_UNUSED, *(name for pair in NAMES for name in pair)})})")


def is_kv_scale(name: str) -> bool:
    """Whether a checkpoint's tensor belongs to a KV cache of 8 bits, and to nothing else."""
    return _ANY.fullmatch(name) is not None


@dataclass(frozen=True)
class KVScaling:
    """What a checkpoint says of a cache of 8 bits, and what is made of it.

    Attributes:
        declared: config.json says that there are scales.
        refused: why what config.json says is not served; "" where it is, or where it says nothing.
        names: the tensors of a layer that hold the scales of keys and of values; (): they are stored as they are.
    """

    declared: bool = False
    refused: str = ""
    names: tuple[str, ...] = ()

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "KVScaling":
        """Read `kv_cache_scheme` of a config.json's quantization_config. It binds nobody whose cache is not of 8 bits."""
        declared = config.get("quantization_config") or config.get("compression_config")
        if not isinstance(declared, Mapping):
            return cls()
        inner = declared.get("quantization")  # ModelOpt's own file has it one level deeper
        algorithm = (inner if isinstance(inner, Mapping) else declared).get("kv_cache_quant_algo")
        scheme = declared.get("kv_cache_scheme")
        if algorithm not in (None, "", "FP8"):
            return cls(refused=f"config.json: quantization_config: kv_cache_quant_algo {algorithm!r:.80} is not supported (FP8 is)")
        if scheme is None:
            return cls()
        if scheme == "static":  # AutoFP8's
            return cls(declared=True)
        try:
            return cls(declared=_has_scales(scheme))
        except UnsupportedModel as error:
            return cls(refused=str(error))

    def found_in(self, tensors: Iterable[str]) -> "KVScaling":
        """The same with the names that a checkpoint's tensors have.

        Raises:
            UnsupportedModel: config.json asks for something else; one line.
            WeightsError: it promises scales that are not there.
        """
        if self.refused:
            raise UnsupportedModel(f"--kv-cache-dtype: {self.refused}")
        there = {match[1] for name in tensors if (match := _ANY.fullmatch(name))}
        names = next((pair for pair in NAMES if there.intersection(pair)), ())
        if self.declared and not names:
            raise WeightsError("the checkpoint has none of the scales of keys and values that config.json's kv_cache_scheme tells of")
        return replace(self, names=names)


def _has_scales(scheme: Any) -> bool:
    """Whether the checkpoint has scales of its own, by a kv_cache_scheme of compressed-tensors."""
    file = "config.json: quantization_config: kv_cache_scheme"
    if not isinstance(scheme, Mapping):
        raise UnsupportedModel(f"{file} must be an object. Given: {scheme!r:.80}")
    fields = Fields(scheme, file)
    bits, kind, strategy = fields.integer("num_bits"), scheme.get("type"), scheme.get("strategy") or "tensor"
    if (bits, kind) != (8, "float"):
        raise UnsupportedModel(f"{file}: {bits} bits of type {kind!r:.80} are not supported (8 bits of type 'float' are)")
    if not fields.boolean("symmetric", True):
        raise UnsupportedModel(f"{file}: zero points are not supported (symmetric: false)")
    if strategy not in ("tensor", "attn_head"):
        raise UnsupportedModel(f"{file}: strategy {strategy!r:.80} is not supported (tensor and attn_head are)")
    return not fields.boolean("dynamic", False)


@dataclass(frozen=True)
class KVScale(Parameter):
    """The scales of a layer's keys, or of its values: float32 [KV heads], of which a checkpoint may have one for all heads."""

    @property
    def tensors(self) -> tuple[Stored, ...]:
        """What the checkpoint must hold; `read` looks at the shape."""
        return (Stored(self.sources[0].name, None),)

    def dtype(self, activations: jnp.dtype, shards: int = 1) -> jnp.dtype:
        """float32, whatever the model computes in."""
        del activations, shards
        return jnp.dtype(jnp.float32)

    def read(self, read: Read, shard: int, shards: int, dtype: np.dtype) -> np.ndarray:
        """Those of a shard's heads.

        Raises:
            WeightsError: they are of another number, not numbers above zero, or of a magnitude that makes no sense.
        """
        name, (axis,) = self.sources[0].name, self.sources[0].axes
        stored = np.asarray(read(name, ())).astype(np.float64).reshape(-1)
        if stored.size not in (1, axis.size):
            raise WeightsError(f"{name} has {stored.size} numbers, not 1 or {axis.size} (KV heads)")
        if not (np.isfinite(stored).all() and (stored > 0).all()):
            raise WeightsError(f"{name} has scales that are not numbers above zero")
        if stored.min() < _LEAST or stored.max() > _MOST:
            raise WeightsError(f"{name} has a scale outside {_LEAST:g} to {_MOST:g}, which no keys or values have")
        return np.broadcast_to(stored, axis.size)[axis.bounds(shard, shards)].astype(dtype)
