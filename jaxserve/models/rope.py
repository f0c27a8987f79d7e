"""Rotary position embeddings (Su et al. 2021, arXiv 2104.09864) and the scalings that checkpoints ask for.

Each head's vector is split in two halves, as Hugging Face's checkpoints have it: element i turns with element i + D/2.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.errors import UnsupportedModel
from jaxserve.models.fields import Fields


@dataclass(frozen=True)
class Rope:
    """Resolved rotary embedding.

    Attributes:
        frequencies: D/2 angles in radians a position, fastest first.
        scale: multiplies cosine and sine (YaRN's attention factor).
        context_factor: how many times longer than `max_position_embeddings` the scaling lets the context be.
    """

    frequencies: tuple[float, ...]
    scale: float = 1.0
    context_factor: float = 1.0

    def __call__(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Cosine and sine, float32 [T, 1, D/2] each, of int32 positions [T]."""
        angles = positions.astype(jnp.float32)[:, None] * jnp.asarray(self.frequencies, jnp.float32)[None, :]
        return jnp.cos(angles)[:, None, :] * self.scale, jnp.sin(angles)[:, None, :] * self.scale


def read_rope(config: Mapping[str, Any], head_dim: int, max_position_embeddings: int, default_theta: float) -> Rope:
    """Read `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before) of a config.json.

    Raises:
        UnsupportedModel: naming a scaling that no code here computes.
    """
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(scaling, Mapping) or any(isinstance(value, Mapping) for value in scaling.values()):
        raise UnsupportedModel("config.json: rope_parameters that differ between layers are not supported")
    fields = Fields({**config, **scaling}, "config.json")
    theta = fields.number("rope_theta", default_theta, above=0.0)
    if fields.number("partial_rotary_factor", 1.0, above=0.0) != 1.0:
        raise UnsupportedModel("config.json: partial rotary embeddings (partial_rotary_factor) are not supported")
    if head_dim % 2:
        raise UnsupportedModel(f"config.json: rotary embeddings need an even head_dim. Given: {head_dim}")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    plain = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    original = fields.integer("original_max_position_embeddings", max_position_embeddings)
    match kind:
        case "default" | None:
            return _rope(plain)
        case "dynamic":
            # The base grows only once a sequence is longer than max_position_embeddings, where the context ends here.
            return _rope(plain)
        case "linear":
            factor = fields.number("factor", above=0.0)
            return _rope(plain / factor, context_factor=max(factor, 1.0))
        case "llama3":
            return _rope(_llama3(plain, fields, original))
        case "yarn":
            return _yarn(plain, theta, fields, original, max_position_embeddings)
        case "divisors":
            # What GGUF's rope_freqs.weight holds; never in a config.json.
            divisors = np.asarray(scaling["divisors"], np.float64)
            if divisors.shape != plain.shape or not np.all((divisors > 0) & np.isfinite(divisors)):
                raise UnsupportedModel(f"GGUF: rope_freqs.weight does not hold {len(plain)} positive numbers")
            return _rope(plain / divisors)
    raise UnsupportedModel(f"config.json: rope_type {kind!r} is not supported (default, linear, dynamic, llama3 and yarn are)")


def _rope(frequencies: np.ndarray, scale: float = 1.0, context_factor: float = 1.0) -> Rope:
    return Rope(tuple(frequencies.tolist()), scale, context_factor)


def _llama3(plain: np.ndarray, fields: Fields, original: int) -> np.ndarray:
    """Llama 3.1: long waves are stretched by the factor, short ones left, those between interpolated."""
    factor, low, high = (fields.number(name, above=0.0) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    if high <= low:
        raise UnsupportedModel(f"config.json: high_freq_factor must be above low_freq_factor. Given: {high:g} and {low:g}")
    turns = original * plain / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return plain * (kept + (1.0 - kept) / factor)


def _yarn(plain: np.ndarray, theta: float, fields: Fields, original: int, max_position_embeddings: int) -> Rope:
    """YaRN (Peng et al. 2023, arXiv 2309.00071), section 3.2: interpolate the waves that turn seldom, by a ramp over the dimensions."""
    factor = fields.number("factor", max_position_embeddings / original, above=0.0)
    dim = 2 * len(plain)

    def dimension(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = dimension(fields.number("beta_fast", 32.0, above=0.0))
    high = dimension(fields.number("beta_slow", 1.0, above=0.0))
    if fields.boolean("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(len(plain)) - low) / (high - low if high != low else 0.001), 0.0, 1.0)

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1.0 else 1.0

    mscale, mscale_all_dim = fields.number("mscale", 0.0), fields.number("mscale_all_dim", 0.0)
    scale = magnitude(mscale) / magnitude(mscale_all_dim) if mscale and mscale_all_dim else magnitude(1.0)
    scale = fields.number("attention_factor", scale, above=0.0)
    return _rope(plain * (1.0 - ramp + ramp / factor), scale, max(original * factor / max_position_embeddings, 1.0))
