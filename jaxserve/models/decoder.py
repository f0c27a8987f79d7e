"""The decoder that all families share: attention and a gated feed-forward network, each behind a norm and around a residual."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.models.config import ModelConfig
from jaxserve.models.kv_scaling import KVScale
from jaxserve.models.layers import Branch, Embedding, Linear, Place, RMSNorm, norm_weight
from jaxserve.models.parameters import Axis, Source
from jaxserve.pallas_kernels import (
    AttentionMetadata,
    LayerKV,
    Shards,
    attention_dtype,
    paged_attention,
    plan_attention,
    rotary_attention,
    rotate_and_write_kv,
)

Rotation = tuple[jax.Array, jax.Array]


class Attention(nnx.Module):
    """Causal self-attention with grouped queries (Ainslie et al. 2023, arXiv 2305.13245) over a paged KV cache."""

    def __init__(self, config: ModelConfig, window: int | None, implementation: str, place: Place):
        hidden, head_dim, traits = Axis("hidden", config.hidden_size), config.head_dim, config.traits
        heads = Axis("attention heads", config.num_heads * head_dim, units=config.num_heads)
        kv_heads = Axis("KV heads", config.num_kv_heads * head_dim, units=config.num_kv_heads, repeat=True)
        self.head_dim = head_dim
        self.window = window
        self.implementation = implementation
        names = tuple(f"self_attn.{name}_proj" for name in "qkv")
        self.qkv = Linear(names, (heads, kv_heads, kv_heads), hidden, traits.qkv_bias, place, after_norm=True)
        self.output = Linear(("self_attn.o_proj",), (hidden,), heads, traits.output_bias, place)
        self.norms = nnx.List([norm_weight(f"self_attn.{name}_norm", head_dim) for name in "qk"]) if traits.qk_norm else None
        self.norm_eps = config.norm_eps
        each_head = Axis("KV heads", config.num_kv_heads, units=config.num_kv_heads, repeat=True)
        scales = [nnx.Param(KVScale((Source(name, (each_head,)),), "ones")) for name in config.kv_scaling.names]
        self.kv_scales = nnx.List(scales) if scales else None

    def __call__(
        self,
        x: jax.Array,
        rotation: Rotation,
        kv: LayerKV,
        metadata: AttentionMetadata,
        shards: Shards,
        dtype: jnp.dtype,
        residual: jax.Array,
        sampled: "SampledRows | None" = None,
    ) -> tuple[Branch, jax.Array, LayerKV]:
        """x [T, hidden] -> what is to be added to the residual stream; the stream; the cache with this step's keys and values in it.

        Args:
            dtype: of activations. x is of the dtype that the projection's matrix takes.
            residual: the residual stream, [T, hidden].
            sampled: the tokens that queries are computed of, and that the stream is returned of; None: all.
        """
        mixed, kv = self.mix(x, rotation, kv, metadata, dtype, sampled)
        return *self.output.branch(mixed, residual if sampled is None else sampled.take(residual), shards), kv

    def mix(
        self,
        x: jax.Array,
        rotation: Rotation,
        kv: LayerKV,
        metadata: AttentionMetadata,
        dtype: jnp.dtype,
        sampled: "SampledRows | None" = None,
    ) -> tuple[jax.Array, LayerKV]:
        """x [T, hidden] -> what the local heads give, [T or R, heads * head_dim], and the cache; as `__call__`."""
        bias = None if self.qkv.bias is None else self.qkv.bias[...]
        norms = None if self.norms is None else tuple(weight[...] for weight in self.norms)
        scales = None if self.kv_scales is None else (self.kv_scales[0][...], self.kv_scales[1][...])
        qkv = self.qkv.matrix.matmul_parts(x, fixed_order=metadata.deterministic)
        projection: dict[str, Any] = dict(bias=bias, norms=norms, eps=self.norm_eps, dtype=attention_dtype(dtype), scales=scales)
        options: dict[str, Any] = dict(scale=self.head_dim**-0.5, window=self.window, soft_cap=None, out_dtype=dtype)
        options["implementation"] = self.implementation
        if sampled is None:
            out, kv = rotary_attention(qkv, rotation, kv, metadata, **projection, **options)
        else:
            q, kv = rotate_and_write_kv(qkv, rotation, kv, metadata, **projection)
            value_scales = None if scales is None else scales[1]
            out = paged_attention(sampled.take(q), kv, sampled.metadata, value_scales=value_scales, **options)
        return out.reshape(out.shape[0], -1), kv


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SampledRows:
    """The tokens of a step that something is sampled from, one a row. What the last layer makes of the others nobody reads.

    Attributes:
        last: int32 [R], as `Decoder` takes it.
        metadata: of a step of these tokens alone, planned.
    """

    last: jax.Array
    metadata: AttentionMetadata

    @classmethod
    def of(cls, last: jax.Array, metadata: AttentionMetadata, q: jax.ShapeDtypeStruct, cache: LayerKV, attention: Attention) -> Self:
        """Lay out their attention over a layer's cache.

        Args:
            metadata: of the step.
            q: of the layer, all tokens.
        """
        starts = jnp.arange(last.shape[0] + 1, dtype=jnp.int32)
        metadata = replace(metadata, query_starts=starts, plan=None, decode_only=True)
        rows = jax.ShapeDtypeStruct((last.shape[0], *q.shape[1:]), q.dtype)
        plan = plan_attention(metadata, rows, cache, window=attention.window, implementation=attention.implementation)
        return cls(last, plan)

    def take(self, x: jax.Array) -> jax.Array:
        """[T, ...] -> [R, ...]."""
        return x.at[self.last].get(mode="promise_in_bounds")


class GatedMLP(nnx.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, place: Place):
        hidden = Axis("hidden", config.hidden_size)
        inner = Axis("feed-forward units", config.intermediate_size, units=config.intermediate_size)
        self.gate_up = Linear(("mlp.gate_proj", "mlp.up_proj"), (inner, inner), hidden, config.traits.mlp_bias, place, after_norm=True)
        self.down = Linear(("mlp.down_proj",), (hidden,), inner, config.traits.mlp_bias, place)

    def __call__(self, x: jax.Array, shards: Shards, dtype: jnp.dtype, residual: jax.Array) -> tuple[Branch, jax.Array]:
        """x [T, hidden] -> what is to be added to the residual stream, and the stream; `dtype` and `residual` as in `Attention`."""
        return self.down.branch(self.gate_up.gated(x, shards, dtype), residual, shards)


class DecoderLayer(nnx.Module):
    """Attention, then the feed-forward network."""

    def __init__(self, config: ModelConfig, window: int | None, attention: str, place: Place):
        self.attention_norm = RMSNorm("input_layernorm", config.hidden_size, config.norm_eps)
        self.attention = Attention(config, window, attention, place)
        self.mlp_norm = RMSNorm("post_attention_layernorm", config.hidden_size, config.norm_eps)
        self.mlp = GatedMLP(config, place)

    def __call__(
        self,
        x: Branch,
        residual: jax.Array,
        rotation: Rotation,
        kv: LayerKV,
        metadata: AttentionMetadata,
        shards: Shards,
        sampled: SampledRows | None = None,
    ) -> tuple[Branch, jax.Array, LayerKV]:
        """Each norm first adds what the branch before it computed, x, to the residual stream; of many tokens the product may have done it.

        Returns:
            x of the feed-forward network, still to be added; the residual stream; the cache with this step's keys and values in it. The
            first two of the `sampled` tokens alone, where these are given.
        """
        with jax.named_scope("attention"):
            dtype = self.attention_norm.weight[...].dtype
            normed, residual = self.attention_norm(x, residual, shards, self.attention.qkv.matrix.input_dtype(dtype))
            x, residual, kv = self.attention(normed, rotation, kv, metadata, shards, dtype, residual, sampled)
        with jax.named_scope("mlp"):
            normed, residual = self.mlp_norm(x, residual, shards, self.mlp.gate_up.matrix.input_dtype(dtype))
            return *self.mlp(normed, shards, dtype, residual), kv


@partial(jax.jit, static_argnums=0)
def _call_layer(
    graphdef: nnx.GraphDef[DecoderLayer],
    state: nnx.State,
    x: Branch,
    residual: jax.Array,
    rotation: Rotation,
    kv: LayerKV,
    metadata: AttentionMetadata,
    shards: Shards,
    sampled: SampledRows | None,
) -> tuple[Branch, jax.Array, LayerKV]:
    """Layers of one kind have equal graph definitions, so that each kind is traced once; the compiler still sees them unrolled."""
    return nnx.merge(graphdef, state)(x, residual, rotation, kv, metadata, shards, sampled)


class Decoder(nnx.Module):
    """Token ids in, logits out; runs inside `jax.shard_map` over a mesh with an axis "tensor".

    Made from a config alone its leaves are the parameters' declarations; `weights.loader` puts arrays in their place.

    Args:
        config: the model's shape.
        attention: which kernels compute it, one of pallas_kernels' implementations.
    """

    def __init__(self, config: ModelConfig, attention: str = "auto"):
        self.config = config
        quantization = config.quantization
        self.embedding = Embedding("model.embed_tokens", config.vocab_size, config.hidden_size, quantization)
        windows = (config.kv_groups[group].window for group in config.group_of_layer)
        places = (Place(quantization, layer_prefix(("layers", i))) for i in range(config.num_layers))
        self.layers = nnx.List([DecoderLayer(config, window, attention, place) for window, place in zip(windows, places, strict=True)])
        self.norm = RMSNorm("model.norm", config.hidden_size, config.norm_eps)
        self.head = None if config.tie_embeddings else Embedding("lm_head", config.vocab_size, config.hidden_size, quantization)

    def __call__(
        self,
        token_ids: jax.Array,
        positions: jax.Array,
        kv: tuple[LayerKV, ...],
        metadata: tuple[AttentionMetadata, ...],
        last: jax.Array,
        shards: Shards,
        *,
        whole: bool = True,
    ) -> tuple[jax.Array, tuple[LayerKV, ...], jax.Array | None]:
        """Compute one step.

        Args:
            token_ids, positions: int32 [T], the rows' tokens one after the other.
            kv: one a layer.
            metadata: one a KV group.
            last: int32 [R], where in the flat axis the token stands that each row samples from.
            shards: how they add up.
            whole: static; whether the last layer computes all tokens. If not, it computes their keys and values and for the rest those of
                `last` alone, which must be one for each row of the metadata. Of prompts that saves most of one layer's time.

        Returns:
            Logits, float32 [R, vocab_size / shards], of the shard's range of the vocabulary; the caches with this step's keys and values;
            what the last layer gives, [T, hidden], from which `logits` makes those of any other token: None where it is not whole.
        """
        dtype = self.norm.weight[...].dtype
        x = self.embedding(token_ids, self.residual_dtype(dtype, shards))
        residual = jnp.zeros((token_ids.shape[0], self.config.hidden_size), self.residual_dtype(dtype, shards))
        rotation = self.config.rope(positions)
        heads = self.config.num_heads // shards.count, self.config.head_dim
        q = jax.ShapeDtypeStruct((token_ids.shape[0], *heads), attention_dtype(dtype))
        layers = [(self.layers[group.layers[0]].attention, kv[group.layers[0]]) for group in self.config.kv_groups]
        sampled = None
        if not whole:
            group = self.config.group_of_layer[-1]
            sampled = SampledRows.of(last, metadata[group], q, kv[-1], self.layers[-1].attention)
        metadata = tuple(
            plan_attention(of_group, q, cache, window=attention.window, implementation=attention.implementation)
            for of_group, (attention, cache) in zip(metadata, layers, strict=True)
        )
        caches = []
        for i, (layer, cache, group) in enumerate(zip(self.layers, kv, self.config.group_of_layer, strict=True)):
            graphdef, state = nnx.split(layer)
            rows = sampled if i == len(self.layers) - 1 else None
            x, residual, cache = _call_layer(graphdef, state, x, residual, rotation, cache, metadata[group], shards, rows)
            caches.append(cache)
        hidden = x.added_to(residual, shards)
        if not whole:
            return self.logits(hidden, shards), tuple(caches), None
        return self.logits(hidden.at[last].get(mode="promise_in_bounds"), shards), tuple(caches), hidden.astype(dtype)

    def logits(self, x: jax.Array, shards: Shards) -> jax.Array:
        """Logits, float32 [T, vocab_size / shards], of what the last layer gives, [T, hidden]; see `Embedding.logits`."""
        with jax.named_scope("logits"):
            normed, _ = self.norm(Branch(x), jnp.zeros_like(x), shards, self.norm.weight[...].dtype)
            return (self.head or self.embedding).logits(normed, shards)

    def residual_dtype(self, dtype: jnp.dtype, shards: Shards) -> jnp.dtype:
        """Of the residual stream, where activations are of `dtype`: float32 for bfloat16, but where a sum is rounded before it is added.

        That is over several shards, since sums are sent in 16 bits, and in quantized models, whose kernels give 16 bits.
        """
        wide = dtype == jnp.bfloat16 and shards.count == 1 and not self.config.quantization.schemes
        return jnp.dtype(jnp.float32) if wide else dtype


def layer_prefix(path: Sequence[object]) -> str:
    """What the checkpoint puts before the source names of a parameter at this path of the decoder's state."""
    return f"model.layers.{path[1]}." if path[0] == "layers" else ""
