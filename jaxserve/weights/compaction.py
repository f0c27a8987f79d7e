"""Compaction: weights are moved next to each other, so that the memory that they leave is one piece.

What is held for a while as weights are loaded (what they are converted or quantized from) leaves holes between them. XLA's allocator
(BFC, "best fit with coalescing") moves nothing, and a program's temporaries must be one piece: where the KV cache takes all that is left
as a sum, holes of a few hundred MiB are an error of the first large step.
"""

import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

logger = logging.getLogger(__name__)

_TOLERATED = 32 * 2**20  # bytes of holes on a device
_GRANULE = 256  # bytes: what the allocator rounds sizes up to
_MOST_SECONDS = 2.0  # until what was deleted is free; it takes milliseconds

type Stats = Callable[[Any], dict[str, int] | None]


def compacted(arrays: Sequence[jax.Array], stats: Stats = lambda device: device.memory_stats()) -> tuple[jax.Array, ...]:
    """The same arrays, moved where there are holes between them; the given ones are deleted then.

    They are copied to where memory is free and back, as many at a time as fit there, from the lowest address on: so what lies before a
    group joins what the group leaves. Of several processes' devices each moves its own shards. 16 GiB there and back take an H200 15 ms.

    Args:
        arrays: all that is large on their devices.
        stats: of a device, as `jax.Device.memory_stats` gives it; None where memory is the operating system's.
    """
    devices = sorted({shard.device for array in arrays for shard in array.addressable_shards}, key=lambda device: device.id)
    if any("bytes_limit" not in (stats(device) or {}) for device in devices):
        return tuple(arrays)
    jax.block_until_ready(arrays)
    holes = {device: _holes(arrays, device) for device in devices}
    total = max(sum(each) for each in holes.values())
    # More than is free lies between regions of memory that the allocator got one by one: nothing could fill that.
    if total <= _TOLERATED or any(sum(each) > _left(stats(device)) for device, each in holes.items()):
        return tuple(arrays)
    begin, moved = time.monotonic(), list(arrays)
    # Without them copies would be put into holes, and leave these where they are.
    plugs = [jax.device_put(np.empty(size, np.uint8), device) for device, sizes in holes.items() for size in sizes]
    jax.block_until_ready(plugs)
    # Each copy goes to the smallest piece that it fits in: to what its group left, if what is free besides is larger.
    room = min(_left(stats(device)) for device in devices) // 2 - total
    for group in _groups(moved, room):
        away = {i: jax.block_until_ready([_copy(shard.data) for shard in moved[i].addressable_shards]) for i in group}
        _delete([*(moved[i] for i in group), *plugs], devices, stats)
        plugs = []
        for i, copies in away.items():
            back = [_copy(copy) for copy in copies]
            moved[i] = jax.make_array_from_single_device_arrays(moved[i].shape, moved[i].sharding, back)
        jax.block_until_ready(moved)
        _delete([copy for copies in away.values() for copy in copies], devices, stats)
    _delete(plugs, devices, stats)
    logger.info("weights were moved together in %.2f s, for holes of %.0f MiB between them", time.monotonic() - begin, total / 2**20)
    return tuple(moved)


def _holes(arrays: Sequence[jax.Array], device: Any) -> list[int]:
    """Sizes in bytes of what lies between arrays on a device."""
    shards = [shard.data for array in arrays for shard in array.addressable_shards if shard.device == device]
    spans = sorted((shard.unsafe_buffer_pointer(), -(-shard.nbytes // _GRANULE) * _GRANULE) for shard in shards)
    gaps = (second - first - size for (first, size), (second, _) in itertools.pairwise(spans))
    return [gap for gap in gaps if gap > 0]


def _groups(arrays: Sequence[jax.Array], room: int) -> Iterator[list[int]]:
    """Which arrays fit into so many bytes at once, ascending by address; the largest of a group first, as the allocator gives away what
    is left of a piece when that is small. An array that does not fit alone stays where it is.
    """
    sizes = [max(shard.data.nbytes for shard in array.addressable_shards) for array in arrays]
    group: list[int] = []
    for i in sorted(range(len(arrays)), key=lambda i: arrays[i].addressable_shards[0].data.unsafe_buffer_pointer()):
        if sizes[i] > room:
            continue
        if sum(sizes[j] for j in group) + sizes[i] > room:
            yield sorted(group, key=lambda j: -sizes[j])
            group = []
        group.append(i)
    if group:
        yield sorted(group, key=lambda j: -sizes[j])


def _copy(array: jax.Array) -> jax.Array:
    return jnp.array(array, copy=True)


def _delete(arrays: Sequence[jax.Array], devices: Sequence[Any], stats: Stats) -> None:
    """And wait until they are gone: another thread may free them."""
    expected = {device: _left(stats(device)) for device in devices}
    for array in arrays:
        for shard in array.addressable_shards:
            expected[shard.device] += shard.data.nbytes
        array.delete()
    end = time.monotonic() + _MOST_SECONDS
    while any(_left(stats(device)) < least for device, least in expected.items()) and time.monotonic() < end:
        time.sleep(0.0005)


def _left(stats: dict[str, int] | None) -> int:
    return 0 if stats is None else stats["bytes_limit"] - stats["bytes_in_use"]
