"""How large the inputs of a model's matrices are, found by letting it compute random tokens, with no text and no data set.

A few columns of most models' activations are far larger than the others, whatever the tokens are (Sun et al. 2024, Massive Activations
in Large Language Models, arXiv 2402.17762). Errors of weights count there as much as the inputs are large.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxserve.models import ModelConfig
from jaxserve.models.decoder import Decoder, DecoderLayer, layer_prefix
from jaxserve.models.formats import Quantization
from jaxserve.models.kv_scaling import KVScaling
from jaxserve.models.layers import Branch, Embedding
from jaxserve.models.parameters import Parameter, Source
from jaxserve.pallas_kernels import AttentionMetadata, Shards, attention_dtype, layer_kv_shape

TOKENS = 256
_PAGE_SIZE = 16
Load = Callable[[Parameter], jax.Array]


def input_moments(config: ModelConfig, load: Load, mesh: Mesh, dtype: jnp.dtype) -> dict[tuple[Source, ...], jax.Array]:
    """Mean squares of the columns of each layer matrix's inputs, float32 [k], by the sources of the matrix.

    They lie on the mesh as the columns of the matrix do. Weights are loaded a layer at a time, and let go.

    Args:
        load: puts a parameter on the mesh.
        dtype: of weights and activations.
    """
    config = replace(config, quantization=Quantization(), kv_scaling=KVScaling())
    decoder = Decoder(config, "xla")
    token_ids = np.random.default_rng(0).integers(0, config.vocab_size, TOKENS).astype(np.int32)
    embedding = _Declared(decoder.embedding, "")
    hidden = _embed(embedding.key, mesh, dtype)(embedding.load(load), token_ids)
    moments: dict[tuple[Source, ...], jax.Array] = {}
    for number, layer in enumerate(decoder.layers):
        declared = _Declared(layer, layer_prefix(("layers", number)))
        hidden, found = _compute(declared.key, mesh, config)(declared.load(load), hidden)
        matrices = (layer.attention.qkv, layer.attention.output, layer.mlp.gate_up, layer.mlp.down)
        for matrix, squares in zip(matrices, found, strict=True):
            (parameter,) = (leaf for leaf in jax.tree.leaves(nnx.state(matrix.matrix)))
            moments[parameter.prefixed(declared.prefix).sources] = squares
    return moments


class _Declared:
    """A module whose leaves are declarations."""

    def __init__(self, module: nnx.Module, prefix: str):
        graphdef, state = nnx.split(module)
        declarations, treedef = jax.tree.flatten(state)
        self.prefix = prefix
        self.parameters: tuple[Parameter, ...] = tuple(parameter.prefixed(prefix) for parameter in declarations)
        self.key = graphdef, treedef, tuple(parameter.spec for parameter in self.parameters)

    def load(self, load: Load) -> tuple[jax.Array, ...]:
        """Its arrays."""
        return tuple(load(parameter) for parameter in self.parameters)


@lru_cache(4)
def _embed(key: tuple[Any, ...], mesh: Mesh, dtype: jnp.dtype) -> Callable[..., jax.Array]:
    """(leaves, token ids [T]) -> [T, hidden]."""
    graphdef, treedef, specs = key

    def step(leaves: tuple[jax.Array, ...], token_ids: jax.Array) -> jax.Array:
        embedding: Embedding = nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves))
        return embedding(token_ids, dtype).whole(dtype, Shards())

    return jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(specs, P()), out_specs=P(), check_vma=False))


@lru_cache(8)
def _compute(key: tuple[Any, ...], mesh: Mesh, config: ModelConfig) -> Callable[..., tuple[jax.Array, tuple[jax.Array, ...]]]:
    """(leaves, [T, hidden]) -> what the layer makes of it, and the mean squares of what goes into its four matrices."""
    graphdef, treedef, specs = key
    pages = TOKENS // _PAGE_SIZE
    shape = layer_kv_shape(pages, _PAGE_SIZE, config.local_kv_heads(mesh.shape["tensor"]), config.head_dim)

    def step(leaves: tuple[jax.Array, ...], hidden: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        layer: DecoderLayer = nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves))
        places = jnp.arange(TOKENS, dtype=jnp.int32)
        metadata = AttentionMetadata(
            page_table=jnp.arange(pages, dtype=jnp.int32)[None, :],
            kv_lens=jnp.asarray([TOKENS], jnp.int32),
            query_starts=jnp.asarray([0, TOKENS], jnp.int32),
            write_pages=places // _PAGE_SIZE,
            write_offsets=places % _PAGE_SIZE,
        )
        gate_up = layer.mlp.gate_up
        of_heads, shards = jnp.zeros(shape, attention_dtype(hidden.dtype)), Shards()
        dtype = layer.attention.qkv.matrix.input_dtype(hidden.dtype)
        outer, residual = layer.attention_norm(Branch(hidden), jnp.zeros_like(hidden), shards, dtype)
        mixed, _ = layer.attention.mix(outer, config.rope(places), (of_heads, of_heads), metadata, hidden.dtype)
        branch, residual = layer.attention.output.branch(mixed, residual, shards)
        inner, residual = layer.mlp_norm(branch, residual, shards, gate_up.matrix.input_dtype(hidden.dtype))
        gated = gate_up.gated(inner, shards, hidden.dtype)
        branch, residual = layer.mlp.down.branch(gated, residual, shards)
        hidden = branch.added_to(residual, shards)
        return hidden, tuple((x.astype(jnp.float32) ** 2).mean(axis=0) for x in (outer, mixed, inner, gated))

    columns = P(), P("tensor"), P(), P("tensor")
    return jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(specs, P()), out_specs=(P(), columns), check_vma=False))
