"""Qwen2 and Qwen2.5: biases on queries, keys and values; later layers may have a sliding window."""

from jaxserve.models.family import Family, Traits, alternating_windows
from jaxserve.models.fields import Fields


def _traits(fields: Fields, num_layers: int) -> Traits:
    return Traits(qkv_bias=True, windows=alternating_windows(fields, num_layers))


QWEN2 = Family("qwen2", "Qwen2ForCausalLM", _traits, {"num_key_value_heads": 32, "max_position_embeddings": 32768})
