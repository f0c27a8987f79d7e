"""What a GGUF file's metadata says of the model, told as Hugging Face's config.json and generation_config.json would."""

import math
from collections.abc import Sequence
from typing import Any

from jaxserve.errors import UnsupportedModel
from jaxserve.gguf_header import GGUFHeader
from jaxserve.models.fields import Fields

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_END_TOKENS = ("eos", "eot", "eom")


def config_of_gguf(header: GGUFHeader, rope_divisors: Sequence[float] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and generation_config.json as dictionaries.

    Args:
        header: of the file.
        rope_divisors: its tensor rope_freqs.weight, which holds Llama 3.1's rope scaling worked out, if it is there.

    Raises:
        UnsupportedModel: an architecture, an option or a value that no code here serves.
    """
    metadata, tensors = header.metadata, header.tensors
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in _ARCHITECTURES:
        raise UnsupportedModel(f"GGUF architecture {name!r:.80} is not supported. Supported: {', '.join(_ARCHITECTURES)}")
    prefix = f"{name}."
    fields = Fields({key.removeprefix(prefix): _common(key, value) for key, value in metadata.items() if key.startswith(prefix)}, "GGUF")
    heads, hidden = fields.integer("attention.head_count"), fields.integer("embedding_length")
    head_dim = fields.integer("attention.key_length", hidden // heads)
    _refuse(fields, head_dim)
    window = fields.values.get("attention.sliding_window")
    embedding = tensors.get("token_embd.weight")
    config = {
        "architectures": ["MistralForCausalLM" if name == "llama" and window else _ARCHITECTURES[name]],
        "num_hidden_layers": fields.integer("block_count"),
        "hidden_size": hidden,
        "intermediate_size": fields.integer("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": embedding.shape[0] if embedding else fields.integer("vocab_size"),
        "max_position_embeddings": fields.integer("context_length"),
        "rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": fields.number("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(fields, rope_divisors),
        "sliding_window": window or None,
        "use_sliding_window": name != "llama" and bool(window),
        "max_window_layers": 0,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in tensors,
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
    }
    ends = [metadata.get(f"tokenizer.ggml.{end}_token_id") for end in _END_TOKENS]
    return config, {"eos_token_id": [end for end in ends if end is not None]}


def _common(key: str, value: Any) -> Any:
    """A value for all layers; some files give it a layer each."""
    if not isinstance(value, list):
        return value
    if any(other != value[0] for other in value):
        raise UnsupportedModel(f"GGUF: {key} differs between layers, which is not supported")
    return value[0] if value else None


def _refuse(fields: Fields, head_dim: int) -> None:
    """Name what the metadata asks for and the decoder does not compute."""
    if fields.integer("attention.value_length", head_dim) != head_dim:
        raise UnsupportedModel("GGUF: values of another size than keys are not supported")
    if fields.integer("rope.dimension_count", head_dim) != head_dim:
        raise UnsupportedModel("GGUF: partial rotary embeddings are not supported")
    if fields.integer("expert_count", 0, low=0):
        raise UnsupportedModel("GGUF: mixtures of experts are not supported")
    for name in ("rope.scaling.yarn_ext_factor", "rope.scaling.yarn_attn_factor"):
        if fields.number(name, 1.0) != 1.0:
            raise UnsupportedModel(f"GGUF: {name} is not supported")


def _rope_scaling(fields: Fields, rope_divisors: Sequence[float] | None) -> dict[str, Any] | None:
    kind = fields.values.get("rope.scaling.type")
    if kind in (None, "none"):
        return None if rope_divisors is None else {"rope_type": "divisors", "divisors": list(rope_divisors)}
    if rope_divisors is not None:
        raise UnsupportedModel(f"GGUF: rope scaling {kind!r:.80} beside rope_freqs.weight is not supported")
    factor = fields.number("rope.scaling.factor", above=0.0)
    # llama.cpp multiplies YaRN's own attention factor by this one, config.json's replaces it.
    attention = fields.number("rope.scaling.attn_factor", 1.0, above=0.0)
    return {
        "rope_type": kind,
        "factor": factor,
        "original_max_position_embeddings": fields.values.get("rope.scaling.original_context_length"),
        "attention_factor": None if attention == 1.0 else attention * (0.1 * math.log(max(factor, 1.0)) + 1.0),
        "beta_fast": fields.values.get("rope.scaling.yarn_beta_fast"),
        "beta_slow": fields.values.get("rope.scaling.yarn_beta_slow"),
    }
