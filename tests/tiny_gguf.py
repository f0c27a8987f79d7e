"""Tiny checkpoints as llama.cpp's converter would write them to GGUF."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from tiny_models import BOS, CONFIGS, END_OF_TURN, EOS

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """llama.cpp's name of a Hugging Face tensor."""
    module, kind = name.rsplit(".", 1)
    if module.startswith("model.layers."):
        _, _, layer, inner = module.split(".", 3)
        return f"blk.{layer}.{_NAMES[inner]}.{kind}"
    return f"{_NAMES[module]}.{kind}"


# Where a block has its float16 numbers, and such that weights come to about 0.05.
_HALVES = {
    "Q4_0": ((0,), 0.01),
    "Q4_1": ((0, 2), 0.01),
    "Q8_0": ((0,), 7e-4),
    "Q4_K": ((0, 2), 3e-4),
    "Q5_K": ((0, 2), 2e-4),
    "Q6_K": ((208,), 4e-5),
}


def random_blocks(kind: str, n: int, k: int, random: np.random.Generator) -> np.ndarray:
    """A matrix [n, k] of a type, uint8 [n, bytes]: random but for its scales, which are of either sign."""
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    packed = random.integers(0, 256, (n, k // block, size), np.uint8)
    places, largest = _HALVES[kind]
    for place in places:
        packed[:, :, place : place + 2] = random.uniform(-largest, largest, packed.shape[:2]).astype(np.float16)[:, :, None].view(np.uint8)
    return packed.reshape(n, -1)


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Interleave the two halves of each head."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def write_gguf(
    path: Path,
    name: str,
    tensors: dict[str, np.ndarray],
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    metadata: dict[str, Any] | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
    blocks: Mapping[str, tuple[np.ndarray, GGMLQuantizationType]] | None = None,
) -> Path:
    """Write one of `tiny_models.CONFIGS`.

    Args:
        tensors: by Hugging Face name.
        kind: of matrices; vectors are float32.
        metadata: further or other values, without the architecture's prefix; None leaves a key out.
        extra: tensors under their GGUF name.
        blocks: matrices by Hugging Face name, as `random_blocks` makes them; rows of queries and keys are as the file has them.
    """
    config = CONFIGS[name]
    architecture = "llama" if config["model_type"] == "mistral" else config["model_type"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    values: dict[str, Any] = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.key_length": config.get("head_dim"),
        "rope.freq_base": float(config["rope_theta"]),
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "vocab_size": config["vocab_size"],
    }
    writer = GGUFWriter(path, architecture)
    for key, value in (values | (metadata or {})).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
        if value is not None:
            add[type(value)](f"{architecture}.{key}", value)
    writer.add_eos_token_id(EOS)
    writer.add_eot_token_id(END_OF_TURN)
    writer.add_bos_token_id(BOS)
    for hf_name, tensor in tensors.items():
        for part, count in (("q_proj", heads), ("k_proj", kv_heads)):
            tensor = permute(tensor, count) if architecture == "llama" and part in hf_name else tensor
        if tensor.ndim == 1 or kind == GGMLQuantizationType.F32:
            writer.add_tensor(gguf_name(hf_name), np.ascontiguousarray(tensor))
        else:
            writer.add_tensor(gguf_name(hf_name), quantize(np.ascontiguousarray(tensor), kind), raw_dtype=kind)
    for gguf_tensor, array in (extra or {}).items():
        writer.add_tensor(gguf_tensor, array)
    for hf_name, (packed, raw) in (blocks or {}).items():
        writer.add_tensor(gguf_name(hf_name), packed, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
