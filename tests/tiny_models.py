"""Tiny random checkpoints of every family, with a tokenizer and a chat template, so that the whole server runs on them.

Weights are a pure function of the name (numpy), and on purpose unlike a trained model's: norm weights and biases far from their
defaults, attention sharp, a large epsilon, so that leaving any of them out changes the tokens. tests/goldens holds what
transformers makes of them; scripts/write_goldens.py writes it and imports this file without JAX.
"""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

VOCAB_SIZE = 320
EOS, BOS, END_OF_TURN = 0, 1, 2
SPECIAL_TOKENS = ("<|end|>", "<|begin|>", "<|turn|>")
CHAT_TEMPLATE = (
    "<|begin|>{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}<|turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

_BASE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 512,
    "rms_norm_eps": 0.02,
    "rope_theta": 1000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "torch_dtype": "float32",
}
_LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **_BASE}
_MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", **_BASE}
_QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **_BASE}
_QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **_BASE, "head_dim": 16}
_LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "llama-mha-tied": {**_LLAMA, "num_key_value_heads": 8, "tie_word_embeddings": True},
    "llama-mqa": {**_LLAMA, "num_key_value_heads": 1},
    "llama-bias": {**_LLAMA, "attention_bias": True, "mlp_bias": True, "head_dim": 32},
    "llama-rope-llama3": {**_LLAMA, "rope_scaling": _LLAMA3_SCALING},
    "llama-rope-linear": {**_LLAMA, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama-rope-dynamic": {**_LLAMA, "rope_scaling": {"type": "dynamic", "factor": 4.0}},
    "llama-rope-yarn": {**_LLAMA, "rope_scaling": _YARN},
    "mistral": {**_MISTRAL, "sliding_window": 24},
    "qwen2": {**_QWEN2, "tie_word_embeddings": True},
    "qwen2-windows": {**_QWEN2, "use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},
    "qwen3": _QWEN3,
    "qwen3-bias": {
        **_QWEN3,
        "attention_bias": True,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    },
}
"""config.json of each tiny checkpoint."""


def write_checkpoint(folder: Path, name: str, seed: int = 0, max_shard_tensors: int | None = None) -> Path:
    """Write one of `CONFIGS` as a Hugging Face model folder.

    Args:
        folder: made if absent.
        seed: other weights of the same shape.
        max_shard_tensors: split the weights into several files of this many tensors, with an index.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = CONFIGS[name]
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    generation = {"eos_token_id": [EOS, END_OF_TURN], "bos_token_id": BOS, "temperature": 0.8, "top_p": 0.95}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=1))
    _write_weights(folder, make_tensors(config, zlib.crc32(name.encode()) + seed), max_shard_tensors)
    write_tokenizer(folder)
    return folder


def make_tensors(config: dict[str, Any], seed: int) -> dict[str, np.ndarray]:
    """Random float32 weights by Hugging Face name."""
    random = np.random.default_rng(seed)
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim", hidden // heads)
    family = config["model_type"]

    def matrix(rows: int, columns: int, gain: float) -> np.ndarray:
        return (random.standard_normal((rows, columns)) * gain / columns**0.5).astype(np.float32)

    def vector(size: int, mean: float = 0.0) -> np.ndarray:
        return (mean + random.standard_normal(size) * 0.4).astype(np.float32)

    tensors = {"model.embed_tokens.weight": matrix(vocab, hidden, hidden**0.5)}
    for i in range(config["num_hidden_layers"]):
        layer = {
            "input_layernorm.weight": vector(hidden, 1.0),
            "post_attention_layernorm.weight": vector(hidden, 1.0),
            "self_attn.q_proj.weight": matrix(heads * head_dim, hidden, 1.5),
            "self_attn.k_proj.weight": matrix(kv_heads * head_dim, hidden, 1.5),
            "self_attn.v_proj.weight": matrix(kv_heads * head_dim, hidden, 1.0),
            "self_attn.o_proj.weight": matrix(hidden, heads * head_dim, 3.0),
            "mlp.gate_proj.weight": matrix(inner, hidden, 1.5),
            "mlp.up_proj.weight": matrix(inner, hidden, 1.5),
            "mlp.down_proj.weight": matrix(hidden, inner, 2.0),
        }
        if family == "qwen2" or config.get("attention_bias"):
            layer |= {f"self_attn.{n}_proj.bias": vector(layer[f"self_attn.{n}_proj.weight"].shape[0]) for n in "qkv"}
        if config.get("attention_bias"):
            layer["self_attn.o_proj.bias"] = vector(hidden)
        if config.get("mlp_bias"):
            layer |= {f"mlp.{n}_proj.bias": vector(layer[f"mlp.{n}_proj.weight"].shape[0]) for n in ("gate", "up", "down")}
        if family == "qwen3":
            layer |= {f"self_attn.{n}_norm.weight": vector(head_dim, 1.0) for n in "qk"}
        tensors |= {f"model.layers.{i}.{key}": value for key, value in layer.items()}
    tensors["model.norm.weight"] = vector(hidden, 1.0)
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = matrix(vocab, hidden, 3.0)
    return tensors


def _write_weights(folder: Path, tensors: dict[str, np.ndarray], max_shard_tensors: int | None) -> None:
    if max_shard_tensors is None:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(tensors)
    shards = [names[i : i + max_shard_tensors] for i in range(0, len(names), max_shard_tensors)]
    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for file, shard in zip(files, shards, strict=True):
        save_file({name: tensors[name] for name in shard}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer of `VOCAB_SIZE` tokens: special tokens, all bytes, then merges of frequent English pairs."""
    merges = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("i", "n"), ("Ġ", "a"), ("e", "r"), ("o", "n"), ("r", "e"), ("Ġ", "s"), ("a", "t")]
    merges += [("n", "d"), ("Ġa", "nd"), ("Ġ", "w"), ("o", "u"), ("e", "n"), ("i", "s"), ("Ġ", "o"), ("Ġo", "f"), ("in", "g"), ("o", "r")]
    merges += [("Ġ", "c"), ("e", "s"), ("a", "n"), ("l", "l"), ("Ġ", "p"), ("Ġ", "f"), ("i", "t"), ("e", "d"), ("Ġ", "b"), ("Ġ", "m")]
    merges += [("Ġ", "in"), ("a", "l"), ("Ġt", "o"), ("o", "m"), ("a", "r"), ("Ġ", "h"), ("i", "c"), ("Ġ", "d"), ("l", "e"), ("Ġ", "l")]
    merges += [("Ġth", "at"), ("Ġt", "h"), ("Ġ", "e"), ("Ġ", "g"), ("Ġ", "n"), ("Ġ", "I"), ("v", "e"), ("u", "r"), ("r", "o"), ("i", "on")]
    merges += [("Ġ", "is"), ("s", "t"), ("Ġ", "y"), ("Ġy", "ou"), ("l", "y"), ("Ġ", "it"), ("Ġ", "on"), ("Ġb", "e"), ("i", "d"), ("c", "h")]
    tokens = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    ordered = sorted(merges, key=lambda pair: len(pair[0] + pair[1]))
    tokens += [left + right for left, right in ordered]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=ordered))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin|>",
        "eos_token": "<|end|>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
