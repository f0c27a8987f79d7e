"""A GGUF file of a model's shape without its weights: header, tokenizer, and a hole where the blocks would be."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter

_Type = GGMLQuantizationType
# Of most matrices, of some layers' down and values, and of the head: what llama.cpp's quantizer makes under these names
# (github.com/ggml-org/llama.cpp, src/llama-quant.cpp).
_TYPES = {
    "q4_k_m": (_Type.Q4_K, _Type.Q6_K, _Type.Q6_K),
    "q5_k_m": (_Type.Q5_K, _Type.Q6_K, _Type.Q6_K),
    "q6_k": (_Type.Q6_K, _Type.Q6_K, _Type.Q6_K),
    "q8_0": (_Type.Q8_0, _Type.Q8_0, _Type.Q8_0),
}
KINDS = tuple(_TYPES)


def write_gguf_shape(folder: Path, kind: str, path: Path) -> None:
    """Write a sparse file, whose tensors are zeros that take no room on the disk.

    Args:
        folder: config.json of a Llama without tied embeddings, and a tokenizer.json of byte-level BPE. Rotary frequencies are not scaled.
        kind: one of KINDS.
        path: the file.
    """
    config = json.loads((folder / "config.json").read_text())
    writer = GGUFWriter(path, "llama")
    _add_shape(writer, config)
    _add_tokenizer(writer, config, json.loads((folder / "tokenizer.json").read_text())["model"])
    num_bytes = 0
    for name, shape, ggml_type in _tensors(config, kind):
        elements, block = GGML_QUANT_SIZES[ggml_type]
        size = math.prod(shape) // elements * block
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=ggml_type)
        num_bytes += GGUFWriter.ggml_pad(size, writer.data_alignment)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        file.truncate(GGUFWriter.ggml_pad(path.stat().st_size, writer.data_alignment) + num_bytes)


def _add_shape(writer: GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])


def _add_tokenizer(writer: GGUFWriter, config: dict[str, Any], model: dict[str, Any]) -> None:
    names = {token_id: token for token, token_id in model["vocab"].items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list([names.get(token_id, f"<{token_id}>") for token_id in range(config["vocab_size"])])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])


def _tensors(config: dict[str, Any], kind: str) -> Iterator[tuple[str, tuple[int, ...], GGMLQuantizationType]]:
    """Name, shape and type of each."""
    most, some, head = _TYPES[kind]
    hidden, wide, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    queries, keys = (config["head_dim"] * config[f"num_{name}_heads"] for name in ("attention", "key_value"))
    yield "token_embd.weight", (config["vocab_size"], hidden), most
    for layer in range(layers):
        finer = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
        often = some if finer else most
        for name, shape, ggml_type in (
            ("attn_norm", (hidden,), _Type.F32),
            ("attn_q", (queries, hidden), most),
            ("attn_k", (keys, hidden), most),
            ("attn_v", (keys, hidden), often),
            ("attn_output", (hidden, queries), most),
            ("ffn_norm", (hidden,), _Type.F32),
            ("ffn_gate", (wide, hidden), most),
            ("ffn_up", (wide, hidden), most),
            ("ffn_down", (hidden, wide), often),
        ):
            yield f"blk.{layer}.{name}.weight", shape, ggml_type
    yield "output_norm.weight", (hidden,), _Type.F32
    yield "output.weight", (config["vocab_size"], hidden), head
