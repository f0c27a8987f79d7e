"""What the rest of jaxserve knows of a model: `ModelConfig`, read from a checkpoint's config.json and nowhere else."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxserve.errors import UnsupportedModel
from jaxserve.models.family import Traits
from jaxserve.models.fields import Fields
from jaxserve.models.formats import Quantization, read_quantization
from jaxserve.models.kv_scaling import KVScaling
from jaxserve.models.registry import find_family
from jaxserve.models.rope import Rope, read_rope


@dataclass(frozen=True)
class KVGroup:
    """Layers whose KV pages are handed out and freed together.

    Attributes:
        layers: their indices.
        window: how many tokens a token sees, itself counted; pages further back can be freed. None: all.
    """

    layers: tuple[int, ...]
    window: int | None


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model and how its checkpoint wants it sampled.

    Attributes:
        family, architecture: "llama", "LlamaForCausalLM".
        max_position_embeddings: the longest context in tokens, rope scaling counted in.
        rope: resolved rotary embedding.
        traits: what else the family asks of the decoder.
        kv_groups: every layer is in one of them.
        eos_token_ids: generation_config.json's, then config.json's.
        bos_token_id: None if there is none.
        dtype: of the checkpoint, such as "bfloat16"; "" where config.json does not tell.
        defaults: (field, value) of generation_config.json's sampling fields that are present.
        quantization: which matrices are quantized, and how.
        kv_scaling: of keys and values in a cache of 8 bits.
    """

    family: str
    architecture: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    norm_eps: float
    rope: Rope
    tie_embeddings: bool
    traits: Traits
    kv_groups: tuple[KVGroup, ...]
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    dtype: str
    defaults: tuple[tuple[str, float], ...]
    quantization: Quantization
    kv_scaling: KVScaling

    @property
    def group_of_layer(self) -> tuple[int, ...]:
        """For each layer, the index of its KV group."""
        group = {layer: i for i, kv_group in enumerate(self.kv_groups) for layer in kv_group.layers}
        return tuple(group[layer] for layer in range(self.num_layers))

    def local_kv_heads(self, shards: int) -> int:
        """KV heads that each of `shards` tensor shards holds; where there are fewer heads than shards, neighbours hold the same one."""
        return max(self.num_kv_heads // shards, 1)

    @classmethod
    def from_hf(
        cls, config: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None, quantize: str | None = None
    ) -> "ModelConfig":
        """Read config.json and generation_config.json as Hugging Face writes them, old and new.

        Args:
            quantize: the value of --quantize.

        Raises:
            UnsupportedModel: one line, for an architecture or option that is not served or a field that makes no sense.
            StartupError: `quantize` and the checkpoint do not go together.
        """
        family = find_family(config.get("architectures"))
        fields = Fields({**family.defaults, **config}, "config.json")
        _refuse(fields)
        num_layers, num_heads = fields.integer("num_hidden_layers"), fields.integer("num_attention_heads")
        if num_layers > _MOST_LAYERS:  # each is declared before a tensor is looked for
            raise UnsupportedModel(f"config.json: {num_layers} layers are not supported (up to {_MOST_LAYERS} are)")
        num_kv_heads = fields.integer("num_key_value_heads", num_heads)
        if num_heads % num_kv_heads:
            raise UnsupportedModel(f"config.json: {num_heads} attention heads cannot share {num_kv_heads} KV heads")
        hidden_size = fields.integer("hidden_size")
        head_dim = fields.integer("head_dim", hidden_size // num_heads)
        context = fields.integer("max_position_embeddings")
        if head_dim > _MOST_HEAD_DIM:  # its rotary frequencies are made before a tensor is looked for
            raise UnsupportedModel(f"config.json: head_dim {head_dim} is not supported (up to {_MOST_HEAD_DIM} is)")
        rope = read_rope(config, head_dim, context, default_theta=10000.0)
        traits = family.traits(fields, num_layers)
        generation = Fields(generation_config or {}, "generation_config.json")
        bos = fields.token_ids("bos_token_id")
        return cls(
            family=family.name,
            architecture=family.architecture,
            num_layers=num_layers,
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            intermediate_size=fields.integer("intermediate_size"),
            vocab_size=fields.integer("vocab_size"),
            max_position_embeddings=int(context * rope.context_factor),
            norm_eps=fields.number("rms_norm_eps", 1e-6, above=0.0),
            rope=rope,
            tie_embeddings=fields.boolean("tie_word_embeddings", False),
            traits=traits,
            kv_groups=_group(traits.windows or (None,) * num_layers),
            eos_token_ids=tuple(dict.fromkeys(generation.token_ids("eos_token_id") + fields.token_ids("eos_token_id"))),
            bos_token_id=bos[0] if bos else None,
            dtype=str(config.get("dtype") or config.get("torch_dtype") or ""),
            quantization=read_quantization(config, quantize),
            kv_scaling=KVScaling.from_hf(config),
            defaults=tuple((name, generation.number(name)) for name in _SAMPLING_FIELDS if generation.values.get(name) is not None),
        )


_MOST_LAYERS, _MOST_HEAD_DIM = 1024, 1024
_SAMPLING_FIELDS = ("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty")


def _refuse(fields: Fields) -> None:
    """Name what config.json asks for and the decoder does not compute."""
    if fields.values.get("hidden_act", "silu") != "silu":
        raise UnsupportedModel(f"config.json: hidden_act {fields.values['hidden_act']!r:.80} is not supported (silu is)")


def _group(windows: tuple[int | None, ...]) -> tuple[KVGroup, ...]:
    """One group a window, in order of the first layer that has it."""
    return tuple(KVGroup(tuple(i for i, other in enumerate(windows) if other == window), window) for window in dict.fromkeys(windows))
