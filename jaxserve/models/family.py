"""How a family of checkpoints differs from the plain decoder."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxserve.errors import UnsupportedModel
from jaxserve.models.fields import Fields


@dataclass(frozen=True)
class Traits:
    """What the one decoder does for a family.

    Attributes:
        qkv_bias, output_bias, mlp_bias: the linears that add a bias.
        qk_norm: queries and keys are normalised a head, before they are rotated.
        windows: for each layer, how many tokens a token sees, itself counted; None sees all. Empty: all layers see all.
    """

    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] = ()


@dataclass(frozen=True)
class Family:
    """One architecture name of config.json.

    Attributes:
        name: of the family, "llama".
        architecture: in config.json's `architectures`.
        traits: (fields of config.json, number of layers) -> Traits.
        defaults: transformers' values for fields that config.json may leave out.
    """

    name: str
    architecture: str
    traits: Callable[[Fields, int], Traits]
    defaults: Mapping[str, Any] = field(default_factory=dict)


def alternating_windows(fields: Fields, num_layers: int) -> tuple[int | None, ...]:
    """Windows of a checkpoint with `use_sliding_window`, and either `layer_types` or `max_window_layers` (full layers come first)."""
    if not fields.boolean("use_sliding_window", False):
        return ()
    window = fields.integer("sliding_window", 4096)
    kinds = fields.values.get("layer_types")
    if kinds is None:
        full_layers = fields.integer("max_window_layers", 28, low=0)
        return tuple(window if i >= full_layers else None for i in range(num_layers))
    if not isinstance(kinds, list) or len(kinds) != num_layers or not set(kinds) <= {"full_attention", "sliding_attention"}:
        raise UnsupportedModel("config.json: layer_types must name full_attention or sliding_attention for every layer")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
