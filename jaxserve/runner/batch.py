"""DeviceBatch: one step's input, as it goes up (one int32 array) and as the programs see it.

The host sends what only it knows: tokens, where each row begins, new entries of page tables, sampling options. All else is
computed on the device, where page tables and last tokens live by slot. A field more a row (an adapter) or a token (positions
[T, 3], embedding overrides) is a line more in `BatchLayout.split`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.pallas_kernels import AttentionMetadata
from jaxserve.pallas_kernels.token_options import Column
from jaxserve.request import Request, SamplingParams
from jaxserve.runner.buckets import Bucket
from jaxserve.runner.kv_cache import KVCachePlan
from jaxserve.runner.sampling_rows import NUM_SAMPLING_COLUMNS, RowPacker


class Sample(Protocol):
    """What a step must know of a sample; the scheduler's Sample says what the fields mean."""

    @property
    def request(self) -> Request: ...
    @property
    def params(self) -> SamplingParams: ...
    @property
    def seed(self) -> int: ...
    @property
    def slot(self) -> int: ...
    @property
    def token_ids(self) -> Sequence[int]: ...
    @property
    def page_tables(self) -> Sequence[Sequence[int]]: ...


class Row(Protocol):
    """One sample's share of a step; as the scheduler's ScheduledRow."""

    @property
    def sample(self) -> Sample: ...
    @property
    def start(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def token_ids(self) -> Sequence[int]: ...
    @property
    def samples(self) -> bool: ...
    @property
    def new_slot(self) -> bool: ...
    @property
    def num_output_tokens(self) -> int: ...
    @property
    def num_scored(self) -> int: ...


class Batch(Protocol):
    """One step; as the scheduler's ScheduledBatch."""

    @property
    def rows(self) -> Sequence[Row]: ...
    @property
    def page_copies(self) -> Sequence[tuple[int, int, int]]: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def num_scored(self) -> int: ...


class Fields(NamedTuple):
    """The parts of a packed batch, on the host (numpy views) or in a program (traced)."""

    token_ids: Any  # [T]; -1: the last token that the row's slot sampled
    starts: Any  # [R] position of each row's first token
    lengths: Any  # [R] tokens of each row; 0 for a padding row
    page_entries: Any  # [E, 2 + groups] slot, index in its page tables, page of each group; slot out of range for padding
    sampling: Any  # [R, NUM_SAMPLING_COLUMNS]; its first column is the slot


@dataclass(frozen=True)
class BatchLayout:
    """Where the fields stand in the packed array of a bucket.

    Attributes:
        bucket: T and R.
        num_groups: KV groups.
        num_page_entries: E: in a step without prefix hits each row begins at most as many pages as its tokens reach.
    """

    bucket: Bucket
    num_groups: int
    num_page_entries: int

    @classmethod
    def of(cls, bucket: Bucket, num_groups: int, page_size: int) -> "BatchLayout":
        """The layout of a bucket."""
        return cls(bucket, num_groups, bucket.num_rows + (0 if bucket.decode_only else bucket.num_tokens // page_size))

    def split(self, packed: Any) -> Fields:
        """Cut a packed array [size]."""
        tokens, rows, entry = self.bucket.num_tokens, self.bucket.num_rows, 2 + self.num_groups
        shapes = ((tokens,), (rows,), (rows,), (self.num_page_entries, entry), (rows, NUM_SAMPLING_COLUMNS))
        ends = list(accumulate(map(math.prod, shapes)))
        return Fields(*(packed[begin:end].reshape(s) for begin, end, s in zip([0, *ends[:-1]], ends, shapes, strict=True)))

    @property
    def size(self) -> int:
        """Length of the packed array."""
        rows = self.bucket.num_rows
        return self.bucket.num_tokens + rows * (2 + NUM_SAMPLING_COLUMNS) + self.num_page_entries * (2 + self.num_groups)


class DeviceBatch(NamedTuple):
    """A step's input inside a program. All int32; T tokens of R rows."""

    token_ids: jax.Array  # [T]
    positions: jax.Array  # [T]
    metadata: tuple[AttentionMetadata, ...]  # one a KV group
    last: jax.Array  # [R] flat index of each row's last token


def unpack_batch(
    packed: jax.Array,
    layout: BatchLayout,
    page_tables: tuple[jax.Array, ...],
    last_tokens: jax.Array,
    plan: KVCachePlan,
    deterministic: bool = False,
) -> tuple[DeviceBatch, tuple[jax.Array, ...]]:
    """Turn a packed array into what the model takes.

    Args:
        packed: int32 [layout.size].
        layout: of the bucket.
        page_tables: for each KV group int32 [slots, pages a request], before this step.
        last_tokens: int32 [slots, 1 + K].
        plan: of the KV cache.
        deterministic: as in AttentionMetadata.

    Returns:
        the batch, and the page tables with the new entries.
    """
    fields = layout.split(packed)
    page_tables = add_page_entries(page_tables, fields.page_entries)
    num_tokens, num_rows, decode_only = layout.bucket.num_tokens, layout.bucket.num_rows, layout.bucket.decode_only
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    if decode_only:
        query_starts = jnp.arange(num_rows + 1, dtype=jnp.int32)
        row, last, real = token, token, fields.lengths > 0
    else:
        # A sum over two axes is one kernel; a cumulative sum is several, and a search a loop, whose condition XLA brings to the host.
        before = jnp.arange(num_rows, dtype=jnp.int32)[None, :] < jnp.arange(num_rows + 1, dtype=jnp.int32)[:, None]
        query_starts = jnp.sum(jnp.where(before, fields.lengths[None, :], 0), axis=1, dtype=jnp.int32)
        row = jnp.sum(query_starts[None, 1:] <= token[:, None], axis=1, dtype=jnp.int32)
        row = jnp.minimum(row, num_rows - 1)
        last, real = jnp.maximum(query_starts[1:] - 1, 0), token < query_starts[-1]
    positions = jnp.where(real, fields.starts[row] + token - query_starts[row], 0)
    slots = fields.sampling[:, Column.SLOT]
    token_ids = jnp.where(fields.token_ids < 0, last_tokens[slots[row], 0], fields.token_ids)
    kv_lens = jnp.where(fields.lengths > 0, fields.starts + fields.lengths, 0)

    def group_metadata(table: jax.Array, num_pages: int) -> AttentionMetadata:
        return AttentionMetadata(
            page_table=table.at[slots].get(mode="promise_in_bounds"),
            kv_lens=kv_lens,
            query_starts=query_starts,
            write_pages=jnp.where(real, table[slots[row], positions // plan.page_size], num_pages),
            write_offsets=positions % plan.page_size,
            decode_only=decode_only,
            deterministic=deterministic,
        )

    metadata = tuple(map(group_metadata, page_tables, plan.num_pages))
    return DeviceBatch(token_ids, positions, metadata, last), page_tables


def add_page_entries(page_tables: tuple[jax.Array, ...], entries: jax.Array) -> tuple[jax.Array, ...]:
    """Write int32 [E, 2 + groups] (slot, index, page of each group) into the page tables; a slot out of range is dropped."""
    return tuple(table.at[entries[:, 0], entries[:, 1]].set(entries[:, 2 + g], mode="drop") for g, table in enumerate(page_tables))


class BatchPacker:
    """The host's side: what the device knows already of each slot, so that only the news goes up.

    Args:
        num_slots: slots are below it.
        num_groups: KV groups.
        page_size: tokens a page.
    """

    def __init__(self, num_slots: int, num_groups: int, page_size: int):
        self._num_slots = num_slots
        self._num_groups = num_groups
        self._page_size = page_size
        self._rows = RowPacker(num_slots)
        self._num_known_pages = np.zeros(num_slots, np.int64)  # entries of each slot's page tables that were sent
        self._wants_logprobs = np.zeros(num_slots, np.bool_)

    def pack(self, batch: Batch, layout: BatchLayout) -> tuple[np.ndarray, np.ndarray, bool]:
        """Make a step's upload; the batch counts as sent.

        Args:
            batch: what the scheduler wants computed.
            layout: of a bucket that holds it.

        Returns:
            int32 [layout.size]; int32 [n, 2 + groups], page entries to be sent before it (more than the layout holds: prefix hits);
            whether any row that samples wants log probabilities.
        """
        rows = batch.rows
        count = len(rows)
        slots = np.array([row.sample.slot for row in rows], np.int64)
        for row in rows:
            if row.new_slot:
                self._enter(row.sample)
        starts = np.array([row.start for row in rows], np.int32)
        lengths = np.array([row.num_tokens for row in rows], np.int32)
        samples = np.array([row.samples for row in rows], np.bool_)
        outputs = np.array([row.num_output_tokens for row in rows], np.int64)
        previous = np.array([row.token_ids[-1] for row in rows], np.int32)
        entries = self._new_page_entries(rows, slots)
        room = layout.num_page_entries

        packed = np.zeros(layout.size, np.int32)
        fields = layout.split(packed)
        fields.token_ids[: batch.num_tokens] = [token for row in rows for token in row.token_ids]
        fields.starts[:count] = starts
        fields.lengths[:count] = lengths
        fields.page_entries[:, 0] = self._num_slots
        fields.page_entries[: len(entries[:room])] = entries[:room]
        fields.sampling[...] = self._rows.pack(slots, starts + lengths, outputs, samples, layout.bucket.num_rows, previous)
        return packed, entries[room:], bool((self._wants_logprobs[slots] & samples).any())

    def padding(self, layout: BatchLayout) -> np.ndarray:
        """The upload of a batch without rows, which changes nothing but padding."""
        nobody = np.zeros(0, np.int64)
        packed = np.zeros(layout.size, np.int32)
        fields = layout.split(packed)
        fields.page_entries[:, 0] = self._num_slots
        fields.sampling[...] = self._rows.pack(nobody, nobody, nobody, nobody.astype(np.bool_), layout.bucket.num_rows)
        return packed

    def _enter(self, sample: Sample) -> None:
        self._rows.enter(sample.slot, sample.params, sample.seed)
        self._num_known_pages[sample.slot] = 0
        self._wants_logprobs[sample.slot] = sample.params.logprobs is not None

    def _new_page_entries(self, rows: Sequence[Row], slots: np.ndarray) -> np.ndarray:
        """int32 [n, 2 + groups]: what page tables have gained since they were last sent."""
        num_pages = np.array([len(row.sample.page_tables[0]) for row in rows], np.int64)
        known = self._num_known_pages[slots]
        grown = np.flatnonzero(num_pages != known)
        if not len(grown):
            return np.zeros((0, 2 + self._num_groups), np.int32)
        entries = np.empty((int((num_pages - known)[grown].sum()), 2 + self._num_groups), np.int32)
        end = 0
        for i in grown.tolist():
            begin, end = end, end + int(num_pages[i] - known[i])
            first, sample = int(known[i]), rows[i].sample
            entries[begin:end, 0] = sample.slot
            entries[begin:end, 1] = np.arange(first, int(num_pages[i]))
            for group, table in enumerate(sample.page_tables):
                entries[begin:end, 2 + group] = table[first:]
        self._num_known_pages[slots] = num_pages
        return entries
