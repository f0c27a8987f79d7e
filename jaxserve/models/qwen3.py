"""Qwen3, dense: queries and keys are normalised a head; the head size does not follow from the hidden size."""

from jaxserve.models.family import Family, Traits, alternating_windows
from jaxserve.models.fields import Fields


def _traits(fields: Fields, num_layers: int) -> Traits:
    bias = fields.boolean("attention_bias", False)
    return Traits(qkv_bias=bias, output_bias=bias, qk_norm=True, windows=alternating_windows(fields, num_layers))


QWEN3 = Family("qwen3", "Qwen3ForCausalLM", _traits, {"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768})
