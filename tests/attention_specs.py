"""Named shapes of paged attention."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.pallas_kernels.layer_kv import LayerKV, layer_kv_shape
from jaxserve.pallas_kernels.metadata import AttentionMetadata


@dataclass(frozen=True)
class ArgSpec:
    """One call.

    Attributes:
        rows: (tokens, tokens in the cache after this step) of each row.
        decode_only: as in AttentionMetadata; padding rows then bring a token each.
        num_rows, num_tokens, num_pages: sizes of the arrays, padding included; 0: as many as the rows need.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rows: tuple[tuple[int, int], ...]
    page_size: int = 16
    window: int | None = None
    soft_cap: float | None = None
    decode_only: bool = False
    num_rows: int = 0
    num_tokens: int = 0
    num_pages: int = 0

    @property
    def num_real_tokens(self) -> int:
        """Tokens without padding."""
        return sum(tokens for tokens, _ in self.rows)

    def make(self, dtype: jnp.dtype, seed: int = 0) -> tuple[jax.Array, LayerKV, AttentionMetadata]:
        """Random queries and pages, in an order that is not the logical one; what no row may see is large, to be noticed."""
        rng = np.random.default_rng(seed)
        page_counts = [-(-length // self.page_size) for _, length in self.rows]
        num_pages = self.num_pages or sum(page_counts) + 1
        num_rows = self.num_rows or len(self.rows)
        num_tokens = num_rows if self.decode_only else self.num_tokens or self.num_real_tokens
        order = rng.permutation(num_pages)
        page_table = np.zeros((num_rows, num_pages), np.int32)
        pages = rng.normal(0, 1, (2, num_pages, self.page_size, self.num_kv_heads, self.head_dim))
        begin = 0
        for row, ((_, length), count) in enumerate(zip(self.rows, page_counts, strict=True)):
            mine = order[begin : begin + count]
            page_table[row, :count] = mine
            pages[:, mine[-1], (length - 1) % self.page_size + 1 :] = 100.0
            begin += count
        pages[:, order[begin:]] = 100.0
        padding = [0] * (num_rows - len(self.rows))
        starts = np.cumsum([0, *(tokens for tokens, _ in self.rows), *padding])
        metadata = AttentionMetadata(
            page_table=jnp.asarray(page_table),
            kv_lens=jnp.asarray([*(length for _, length in self.rows), *padding], jnp.int32),
            query_starts=jnp.arange(num_rows + 1, dtype=jnp.int32) if self.decode_only else jnp.asarray(starts, jnp.int32),
            write_pages=jnp.full(num_tokens, num_pages, jnp.int32),
            write_offsets=jnp.zeros(num_tokens, jnp.int32),
            decode_only=self.decode_only,
        )
        keys, values = (_to_layout(x, dtype) for x in pages)
        return jnp.asarray(rng.normal(0, 1, (num_tokens, self.num_heads, self.head_dim)), dtype), (keys, values), metadata


def _to_layout(pages: np.ndarray, dtype: jnp.dtype) -> jax.Array:
    """[pages, page_size, KH, D] as the cache holds it."""
    num_pages, page_size, num_kv_heads, head_dim = pages.shape
    pages = pages.swapaxes(1, 2)
    assert pages.shape == layer_kv_shape(num_pages, page_size, num_kv_heads, head_dim)
    return jnp.asarray(pages, dtype)


_DECODE = ArgSpec(6, 2, 16, (), decode_only=True, num_rows=5, num_pages=48)
_MIXED = ArgSpec(6, 2, 16, (), num_rows=6, num_tokens=240, num_pages=56)
_WINDOW = replace(_MIXED, window=20)

SMALL: dict[str, ArgSpec] = {
    "decode": replace(_DECODE, rows=((1, 1), (1, 300), (1, 17), (1, 128), (1, 129))),
    "decode, padding": replace(_DECODE, rows=((1, 40), (1, 3))),
    "decode, one row": replace(_DECODE, rows=((1, 700),)),
    "decode, nobody": _DECODE,
    "decode, window": replace(_DECODE, window=128, rows=((1, 5), (1, 128), (1, 129), (1, 256), (1, 200))),
    "decode, one row, one KV head a query head": ArgSpec(4, 4, 16, ((1, 260),), decode_only=True),
    "one chunk from the start": replace(_MIXED, rows=((150, 150),)),
    "one chunk of a long prompt": replace(_MIXED, rows=((100, 500),)),
    "chunks": replace(_MIXED, rows=((64, 64), (2, 2), (65, 300), (3, 130))),
    "mixed": replace(_MIXED, rows=((1, 300), (1, 1), (70, 230), (1, 20), (5, 5))),
    "mixed, all tokens": replace(_MIXED, rows=((1, 300), (200, 200), (39, 39))),
    "mixed, decodes alone": replace(_MIXED, rows=((1, 30), (1, 200))),
    "mixed, nobody": _MIXED,
    "window": replace(_WINDOW, rows=((1, 300), (1, 8), (1, 21), (140, 400), (30, 30))),
    "window, first token of a block": replace(_WINDOW, rows=((1, 148), (1, 149), (64, 276), (65, 212))),
    "window of a token": ArgSpec(4, 2, 16, ((1, 30), (70, 140)), window=1),
    "soft cap, one KV head": ArgSpec(8, 1, 32, ((1, 300), (140, 400)), soft_cap=3.0),
    "pages of a token": ArgSpec(4, 2, 16, ((1, 30), (70, 140)), page_size=1),
    "pages of 48": ArgSpec(4, 2, 16, ((1, 300), (140, 400)), page_size=48),
}
"""What an implementation must get right; quick everywhere, for many share their shapes."""
