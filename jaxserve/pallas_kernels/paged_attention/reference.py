"""Paged attention said plainly: the specification that every implementation is tested against."""

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels.layer_kv import LayerKV
from jaxserve.pallas_kernels.metadata import AttentionMetadata


def paged_attention_reference(
    q: jax.Array, kv: LayerKV, metadata: AttentionMetadata, *, scale: float, window: int | None, soft_cap: float | None
) -> jax.Array:
    """Attention of each token over its row's pages; materialises every score. Shapes as in `paged_attention`."""
    num_tokens, num_heads, head_dim = q.shape
    num_rows, num_pages = metadata.page_table.shape
    num_kv_heads, page_size = kv[0].shape[1:3]
    keys, values = (pages[metadata.page_table].astype(jnp.float32).swapaxes(2, 3) for pages in kv)  # [R, P, page_size, KH, D]
    keys, values = (x.reshape(num_rows, num_pages * page_size, num_kv_heads, head_dim) for x in (keys, values))

    token = jnp.arange(num_tokens, dtype=jnp.int32)
    row = jnp.clip(jnp.searchsorted(metadata.query_starts, token, side="right").astype(jnp.int32) - 1, 0, num_rows - 1)
    position = metadata.kv_lens[row] - metadata.query_starts[row + 1] + token  # bottom-right causal: a row's last token sees all of kv_len
    key_position = jnp.arange(num_pages * page_size, dtype=jnp.int32)
    visible = key_position[None, :] <= position[:, None]  # [T, S]
    if window is not None:
        visible &= key_position[None, :] > position[:, None] - window
    visible &= (token < metadata.query_starts[num_rows])[:, None]

    grouped = q.astype(jnp.float32).reshape(num_tokens, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = scale * jnp.einsum("tkgd,tskd->tkgs", grouped, keys[row])
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    scores = jnp.where(visible[:, None, None, :], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1, where=visible[:, None, None, :])
    weights = jnp.where(visible[:, None, None, :], weights, 0.0)
    out = jnp.einsum("tkgs,tskd->tkgd", weights, values[row])
    return out.reshape(num_tokens, num_heads, head_dim).astype(q.dtype)
