"""A plain loop around a model, without scheduler or runner: every token of a prompt in one step."""

from collections.abc import Callable
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxserve.models import Architecture, Model
from jaxserve.pallas_kernels import AttentionMetadata, Shards, layer_kv_shape, page_dtype

PAGE_SIZE = 8


def make_mesh(tensor: int) -> Mesh:
    """A 1xtensor mesh of fake CPU devices."""
    return Mesh(np.asarray(jax.devices()[:tensor]).reshape(1, tensor), ("data", "tensor"))


def logits_of(model: Model, mesh: Mesh, tokens: list[int], bucket: int, kv_dtype: str = "float32") -> np.ndarray:
    """Logits, float32 [len(tokens), vocab], at every position of one prompt, padded to `bucket` tokens, over a cache of `kv_dtype`."""
    count, pages = len(tokens), -(-bucket // PAGE_SIZE)
    flat = np.arange(bucket, dtype=np.int32)
    real = flat < count
    # Pages in a scrambled order: reading them in the order of the pool must not work by chance.
    table = np.random.default_rng(1).permutation(pages).astype(np.int32)
    metadata = AttentionMetadata(
        page_table=jnp.asarray(table)[None, :],
        kv_lens=jnp.asarray([count], jnp.int32),
        query_starts=jnp.asarray([0, count], jnp.int32),
        write_pages=jnp.asarray(np.where(real, table[flat // PAGE_SIZE], pages)),
        write_offsets=jnp.asarray(flat % PAGE_SIZE),
        decode_only=False,
    )
    padded = jnp.asarray(np.where(real, np.pad(np.asarray(tokens, np.int32), (0, bucket - count)), 0))
    forward = _forward(model.architecture, mesh, pages, kv_dtype)
    return np.asarray(forward(model.leaves, padded, jnp.asarray(flat), metadata))[:count, : model.config.vocab_size]


@lru_cache
def _forward(architecture: Architecture, mesh: Mesh, pages: int, kv_dtype: str) -> Callable[..., jax.Array]:
    """(leaves, token ids [T], positions [T], metadata) -> logits [T, vocab or wider], jitted over an empty cache of so many pages."""
    config = architecture.config
    shape = layer_kv_shape(pages, PAGE_SIZE, config.local_kv_heads(mesh.shape["tensor"]), config.head_dim)
    dtype = page_dtype(jnp.dtype(kv_dtype), "cpu")

    def step(leaves: tuple[jax.Array, ...], token_ids: jax.Array, positions: jax.Array, metadata: AttentionMetadata) -> jax.Array:
        kv = tuple((jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.num_layers))
        everywhere = jnp.arange(token_ids.shape[0], dtype=jnp.int32)
        return architecture.apply(leaves, token_ids, positions, kv, (metadata,) * len(config.kv_groups), everywhere, Shards())[0]

    specs = (architecture.specs, P(), P(), P())
    step = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=P(None, "tensor"), check_vma=False)
    return jax.jit(step, compiler_options={"xla_backend_optimization_level": 0})  # compiles in half the time
