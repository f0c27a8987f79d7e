"""Merged projections of queries, keys and values, with what `rotate_and_write_kv` takes beside them."""

import jax.numpy as jnp
import numpy as np

from jaxserve.pallas_kernels import AttentionMetadata

BF16 = jnp.dtype(jnp.bfloat16)
PAGE_SIZE = 16


def normal(random, shape, dtype=BF16):
    return jnp.asarray(random.standard_normal(shape), jnp.float32).astype(dtype)


def make_qkv(num_tokens, num_heads, num_kv_heads, head_dim, *, qk_norms=False, bias=False, kv_dtype=BF16, scaled=False):
    """A step of `num_tokens` whose second token and last quarter are padding: arguments and options of `rotate_and_write_kv`."""
    random = np.random.default_rng(0)
    num_pages = -(-num_tokens // PAGE_SIZE) + 1
    place = random.permutation(num_pages * PAGE_SIZE)[:num_tokens]
    token = np.arange(num_tokens)
    pages = np.where((token == 1) | (token >= num_tokens * 3 // 4), num_pages, place // PAGE_SIZE)
    unused = jnp.zeros((1,), jnp.int32)
    metadata = AttentionMetadata(unused[None], unused, unused, jnp.asarray(pages, jnp.int32), jnp.asarray(place % PAGE_SIZE, jnp.int32))
    angles = random.uniform(0, 6.28, (num_tokens, 1, head_dim // 2)).astype(np.float32)
    columns = (num_heads + 2 * num_kv_heads) * head_dim
    kv = tuple(normal(random, (num_pages, num_kv_heads, PAGE_SIZE, head_dim), kv_dtype) for _ in range(2))
    arguments = normal(random, (num_tokens, columns)), (jnp.cos(angles), jnp.sin(angles)), kv, metadata
    norms = (normal(random, (head_dim,)), normal(random, (head_dim,))) if qk_norms else None
    scales = tuple(jnp.asarray(random.uniform(0.05, 0.5, num_kv_heads).astype(np.float32)) for _ in range(2)) if scaled else None
    return arguments, dict(bias=normal(random, (columns,)) if bias else None, norms=norms, scales=scales)
