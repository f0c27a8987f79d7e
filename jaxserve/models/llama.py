"""Llama 2, 3, 3.1 and later, SmolLM2, and others that keep Llama's architecture."""

from jaxserve.models.family import Family, Traits
from jaxserve.models.fields import Fields


def _traits(fields: Fields, num_layers: int) -> Traits:
    bias = fields.boolean("attention_bias", False)
    return Traits(qkv_bias=bias, output_bias=bias, mlp_bias=fields.boolean("mlp_bias", False))


LLAMA = Family("llama", "LlamaForCausalLM", _traits, {"max_position_embeddings": 2048})
