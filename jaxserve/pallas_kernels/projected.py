"""What a layer's merged projection gives, before it is queries, keys and values."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels.layer_kv import KVScales, LayerKV
from jaxserve.pallas_kernels.metadata import AttentionMetadata


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Projected:
    """Heads still to be rotated, and what that takes; as `rotate_and_write_kv` is given it. Also a kernel's references to all of it.

    Attributes:
        parts: [P, T, (H + 2 KH) D], parts of a step's query heads, key heads, value heads.
        cos, sin: float32 [T, 1, D/2].
        write_pages, write_offsets: int32 [T], of the metadata.
        bias: [(H + 2 KH) D] or None.
        norms: weights [D] of the norms of query and key heads, or None.
        scales: float32 [KH] each, of stored keys and values, or None.
        eps: static; of the norms.
        dtype: static; of queries, and of keys and values before they are stored.
    """

    parts: jax.Array
    cos: jax.Array
    sin: jax.Array
    write_pages: jax.Array
    write_offsets: jax.Array
    bias: jax.Array | None
    norms: tuple[jax.Array, jax.Array] | None
    scales: KVScales | None
    eps: float = field(metadata={"static": True})
    dtype: jnp.dtype = field(metadata={"static": True})

    @classmethod
    def of(
        cls,
        qkv: jax.Array,
        rotation: tuple[jax.Array, jax.Array],
        kv: LayerKV,
        metadata: AttentionMetadata,
        *,
        bias: jax.Array | None,
        norms: tuple[jax.Array, jax.Array] | None,
        eps: float,
        dtype: jnp.dtype | None,
        scales: KVScales | None,
    ) -> "Projected":
        """From the arguments of `rotate_and_write_kv`.

        Raises:
            ValueError: shapes that do not fit together.
        """
        _, num_kv_heads, _, head_dim = kv[0].shape
        num_tokens, size = qkv.shape[-2:]
        if size % head_dim or size <= 2 * num_kv_heads * head_dim or rotation[0].shape != (num_tokens, 1, head_dim // 2):
            raise ValueError(f"qkv {qkv.shape} and cosines {rotation[0].shape} do not go with {num_kv_heads} KV heads of {head_dim}")
        if scales is not None and any(scale.shape != (num_kv_heads,) for scale in scales):
            raise ValueError(f"scales {[scale.shape for scale in scales]} do not go with {num_kv_heads} KV heads")
        parts = qkv if qkv.ndim == 3 else qkv[None]
        places = metadata.write_pages, metadata.write_offsets
        return cls(parts, *rotation, *places, bias, norms, scales, eps, jnp.dtype(dtype or qkv.dtype))

    def queries(self, kv: LayerKV) -> jax.ShapeDtypeStruct:
        """What the queries [T, H, D] will be like."""
        _, num_kv_heads, _, head_dim = kv[0].shape
        _, num_tokens, size = self.parts.shape
        return jax.ShapeDtypeStruct((num_tokens, size // head_dim - 2 * num_kv_heads, head_dim), self.dtype)
