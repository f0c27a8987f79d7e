"""A Llama in plain arithmetic, the reference of benchmarks.correctness: numpy in float64, or jax.numpy in float32 at highest precision.

It shares no code with the decoder. tests/test_correctness.py holds it against what transformers computes of tiny checkpoints;
goldens/llama_8b_4_layers.npz holds float64 logits of the 8B's widths, written by `python -m benchmarks.plain_llama FOLDER` on a CPU in
80 s and 4 GB. It must be written again where dummy weights are made otherwise, or tensors are merged otherwise into parameters.
"""

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).parent / "goldens" / "llama_8b_4_layers.npz"
GOLDEN_TOKENS, GOLDEN_LAYERS, GOLDEN_COLUMNS = 512, 4, 32
WEIGHT_BOUND = 0.02 * 3**0.5  # uniform with a deviation of 0.02: with the small weights of speed measurements attention would hardly choose
# Of XLA on a GPU: its autotuner takes half a minute for the products of each length of a prompt.
NOT_AUTOTUNED = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0}
BLOCK = 512  # queries whose scores are in memory at a time

type Array = Any  # of numpy or jax
type MapBlocks = Callable[[Callable[[Array], Array], Array], Array]


def frequencies(config: Mapping[str, Any]) -> np.ndarray:
    """Angles a position of rotary embeddings, [D/2]; of `rope_scaling` the kind "llama3", which stretches waves longer than its context."""
    dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    plain = config["rope_theta"] ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
    scaling = config.get("rope_scaling")
    if scaling is None:
        return plain
    assert scaling["rope_type"] == "llama3", "the plain model knows no other scaling"
    waves_in_context = scaling["original_max_position_embeddings"] * plain / (2 * np.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = (waves_in_context - low) / (high - low)
    between = (1 - smooth) * plain / scaling["factor"] + smooth * plain
    return np.where(waves_in_context < low, plain / scaling["factor"], np.where(waves_in_context > high, plain, between))


@dataclass(frozen=True)
class PlainLlama:
    """One prompt at a time, all positions at once.

    Attributes:
        config: config.json.
        xp: numpy or jax.numpy.
        map_blocks: (function of a block number, block numbers) -> its results, stacked.
    """

    config: Mapping[str, Any]
    xp: Any
    map_blocks: MapBlocks

    def rotation(self, num_tokens: int, dtype: Any) -> tuple[Array, Array]:
        """Cosine and sine, [T, 1, D/2]; the angles are computed in float64."""
        angles = np.arange(num_tokens)[:, None] * frequencies(self.config)[None, :]
        return self.xp.asarray(np.cos(angles)[:, None], dtype), self.xp.asarray(np.sin(angles)[:, None], dtype)

    def layer(self, x: Array, weights: Mapping[str, Array], rotation: tuple[Array, Array]) -> Array:
        """[T, hidden] -> [T, hidden]; weights by their names within the layer."""
        xp, num_tokens = self.xp, x.shape[0]
        heads, kv_heads = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        normed = self.norm(x, weights["input_layernorm.weight"])
        q, k, v = (normed @ weights[f"self_attn.{name}_proj.weight"].T for name in "qkv")
        q = self._rotate(q.reshape(num_tokens, heads, -1), rotation)
        k = self._rotate(k.reshape(num_tokens, kv_heads, -1), rotation).transpose(1, 2, 0)[:, None]  # [KH, 1, D, T]
        v = v.reshape(num_tokens, kv_heads, -1).transpose(1, 0, 2)[:, None]  # [KH, 1, T, D]
        block, dim = min(BLOCK, num_tokens), q.shape[-1]
        assert num_tokens % block == 0, "pad the prompt to whole blocks"
        # [blocks, KH, heads of a group, block, D]
        blocks = q.reshape(num_tokens // block, block, kv_heads, heads // kv_heads, dim).transpose(0, 2, 3, 1, 4)

        def attend(index: Array) -> Array:
            scores = (blocks[index] @ k) * dim**-0.5
            seen = xp.arange(num_tokens)[None, :] <= index * block + xp.arange(block)[:, None]
            scores = xp.where(seen[None, None], scores, xp.asarray(-np.inf, scores.dtype))
            weights = xp.exp(scores - scores.max(axis=-1, keepdims=True))
            return (weights / weights.sum(axis=-1, keepdims=True)) @ v

        out = self.map_blocks(attend, xp.arange(num_tokens // block)).transpose(0, 3, 1, 2, 4).reshape(num_tokens, heads * dim)
        x = x + out @ weights["self_attn.o_proj.weight"].T
        normed = self.norm(x, weights["post_attention_layernorm.weight"])
        gate, up = (normed @ weights[f"mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        return x + (gate / (1 + xp.exp(-gate)) * up) @ weights["mlp.down_proj.weight"].T

    def norm(self, x: Array, weight: Array) -> Array:
        """RMS norm over the last axis."""
        return x / self.xp.sqrt((x * x).mean(axis=-1, keepdims=True) + self.config["rms_norm_eps"]) * weight[None, :]

    def _rotate(self, x: Array, rotation: tuple[Array, Array]) -> Array:
        (cos, sin), half = rotation, x.shape[-1] // 2
        a, b = x[..., :half], x[..., half:]
        return self.xp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


LAYER_TENSORS = (
    "input_layernorm.weight",
    *(f"self_attn.{name}_proj.weight" for name in "qkvo"),
    "post_attention_layernorm.weight",
    *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
)


def hidden_in_float64(config: Mapping[str, Any], tensor: Callable[[str], np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """Normed hidden states, float64 [T, hidden], with numpy; `tensor` gives a tensor by its checkpoint name, one is asked for at a time."""
    plain = PlainLlama(config, np, lambda function, blocks: np.stack([function(block) for block in blocks]))
    x, rotation = tensor("model.embed_tokens.weight")[tokens].astype(np.float64), plain.rotation(len(tokens), np.float64)
    for number in range(config["num_hidden_layers"]):
        x = plain.layer(x, {name: tensor(f"model.layers.{number}.{name}").astype(np.float64) for name in LAYER_TENSORS}, rotation)
    return plain.norm(x, tensor("model.norm.weight").astype(np.float64))


class Float32Llama:
    """The same in float32 at highest precision on JAX's device. A prompt has up to BLOCK tokens or a multiple of it.

    Args:
        config: config.json.
        tensor: gives a tensor by its checkpoint name; a layer's are asked for at a time.
    """

    def __init__(self, config: Mapping[str, Any], tensor: Callable[[str], Any]):
        import jax
        import jax.numpy as jnp

        self._jnp = jnp
        self._plain = PlainLlama(config, jnp, jax.lax.map)
        self._tensor = tensor
        plain = self._plain

        def layer(x: Array, weights: Mapping[str, Array], rotation: tuple[Array, Array]) -> Array:
            with jax.default_matmul_precision("highest"):
                return plain.layer(x, {name: weight.astype(jnp.float32) for name, weight in weights.items()}, rotation)

        self._layer, self._norm = (jax.jit(function, compiler_options=NOT_AUTOTUNED) for function in (layer, plain.norm))

    def hidden(self, tokens: np.ndarray) -> Any:
        """Normed hidden states, a float32 array [T, hidden]."""
        jnp, tensor = self._jnp, self._tensor
        x = tensor("model.embed_tokens.weight")[jnp.asarray(tokens)].astype(jnp.float32)
        rotation = self._plain.rotation(len(tokens), jnp.float32)
        for number in range(self._plain.config["num_hidden_layers"]):
            x = self._layer(x, {name: tensor(f"model.layers.{number}.{name}") for name in LAYER_TENSORS}, rotation)
        return self._norm(x, tensor("model.norm.weight").astype(jnp.float32))


def prompt_tokens(count: int, vocab_size: int, seed: int = 0) -> np.ndarray:
    """Token ids of a prompt, the same everywhere."""
    return np.random.default_rng(seed).integers(3, min(49000, vocab_size), count).astype(np.int32)


def golden_columns(vocab_size: int) -> np.ndarray:
    """The token ids whose logits the golden holds."""
    return np.random.default_rng(1).choice(vocab_size, GOLDEN_COLUMNS, replace=False).astype(np.int32)


def main() -> None:
    """Write the golden: dummy weights of a folder's shape rounded to bfloat16, float64 arithmetic, some logits at every position."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    import jax
    import jax.numpy as jnp

    from jaxserve.models import Architecture, ModelConfig
    from jaxserve.runner import make_mesh
    from jaxserve.weights.dummy import random_array

    config = json.loads((arguments.folder / "config.json").read_text()) | {"num_hidden_layers": GOLDEN_LAYERS}
    mesh = make_mesh(1, devices=jax.devices("cpu"))
    parameters = {p.sources[0].name: p for p in Architecture.of(ModelConfig.from_hf(config)).parameters}
    parameter_of = {source.name: p for p in parameters.values() for source in p.sources}

    def tensor(name: str) -> np.ndarray:
        parameter = parameter_of[name]
        rows = np.cumsum([0, *(source.shape[0] for source in parameter.sources)])
        index = [source.name for source in parameter.sources].index(name)
        return np.asarray(random_array(parameter, mesh, jnp.dtype(jnp.bfloat16), WEIGHT_BOUND)[rows[index] : rows[index + 1]])

    tokens, columns = prompt_tokens(GOLDEN_TOKENS, config["vocab_size"]), golden_columns(config["vocab_size"])
    hidden = hidden_in_float64(config, tensor, tokens)
    logits = hidden @ tensor("lm_head.weight").astype(np.float64).T
    log_sums = np.log(np.exp(logits).sum(axis=1))
    GOLDEN.parent.mkdir(exist_ok=True)
    np.savez_compressed(GOLDEN, logits=logits[:, columns].astype(np.float32), log_sums=log_sums.astype(np.float32))
    print(f"{GOLDEN}: logits of standard deviation {logits.std():.3f}")


if __name__ == "__main__":
    main()
