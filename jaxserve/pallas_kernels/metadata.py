"""Where the tokens of a step stand in the KV cache."""

from dataclasses import dataclass, field
from typing import Any

import jax

type Queries = jax.Array | jax.ShapeDtypeStruct  # of a layer [T, H, D], or what they are like


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AttentionMetadata:
    """One per KV group and step. T tokens (flat, row after row) of R rows, page tables of P pages; all arrays int32.

    Attributes:
        page_table: [R, P] pages of each row in logical order; entries that are unused, or freed behind a window, hold any valid page.
        kv_lens: [R] tokens of the row in the cache after this step's writes; 0 for a padding row.
        query_starts: [R + 1] first token of each row in the flat axis; padding rows are empty and come last, tokens from
            query_starts[R] on are padding.
        write_pages: [T] page that takes each token's K and V; padding tokens name a page out of range, which drops them.
        write_offsets: [T] place in that page.
        plan: the step's work as the device's implementation wants it laid out, and memory that its layers hand on, by `plan_attention`;
            None: made anew for each layer.
        decode_only: static; every row has exactly one token: T == R and token i belongs to row i.
        deterministic: static; what a token gets must be the same to the bit wherever in the step it stands, whatever stands beside it,
            and whether it comes alone or in a chunk.
    """

    page_table: jax.Array
    kv_lens: jax.Array
    query_starts: jax.Array
    write_pages: jax.Array
    write_offsets: jax.Array
    plan: Any = None
    decode_only: bool = field(default=False, metadata={"static": True})
    deterministic: bool = field(default=False, metadata={"static": True})
