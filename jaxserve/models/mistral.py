"""Mistral 7B and its like: Llama whose layers all look through one sliding window."""

from jaxserve.errors import UnsupportedModel
from jaxserve.models.family import Family, Traits
from jaxserve.models.fields import Fields


def _traits(fields: Fields, num_layers: int) -> Traits:
    if fields.values.get("layer_types") is not None:
        raise UnsupportedModel("config.json: layer_types of a Mistral checkpoint are not supported")
    # Absent is not null here: transformers' default is a window of 4096 tokens.
    if "sliding_window" in fields.values and fields.values["sliding_window"] is None:
        return Traits()
    return Traits(windows=(fields.integer("sliding_window", 4096),) * num_layers)


MISTRAL = Family("mistral", "MistralForCausalLM", _traits, {"num_key_value_heads": 8, "max_position_embeddings": 131072})
