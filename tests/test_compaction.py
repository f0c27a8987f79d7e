import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.weights.compaction import compacted

MIB = 2**20


def _stats(device):
    """What an allocator would tell whose whole pool is jaxserve's."""
    used = sum(shard.data.nbytes for array in jax.live_arrays() for shard in array.addressable_shards if shard.device == device)
    return {"bytes_limit": 8 * 2**30, "bytes_in_use": used}


def _at(buffer, offset, values):
    """An array that lies there: JAX takes over what lies on a 64-byte boundary as it is."""
    place = buffer[offset : offset + values.nbytes].view(values.dtype)
    place[:] = values
    array = jax.device_put(place, jax.devices()[0])
    assert array.unsafe_buffer_pointer() == place.ctypes.data
    return array


@pytest.fixture(autouse=True)
def nobody_waits(monkeypatch):
    """For memory to be free: JAX counts an array's shards again as arrays."""
    monkeypatch.setattr("jaxserve.weights.compaction._MOST_SECONDS", 0)


@pytest.fixture
def buffer():
    whole = np.empty(64 * MIB + 4096, np.uint8)
    return whole[-whole.ctypes.data % 4096 :][: 64 * MIB]


def test_weights_with_holes_between_them_are_moved_and_stay_what_they_are(buffer, caplog):
    values = [np.arange(n, dtype=np.float32) for n in (1 << 16, 1 << 18, 5)]
    arrays = [_at(buffer, offset, value) for offset, value in zip((0, 50 * MIB, 30 * MIB), values, strict=True)]
    with caplog.at_level("INFO", "jaxserve"):
        moved = compacted(arrays, _stats)
    assert all(array.is_deleted() for array in arrays)
    for array, value in zip(moved, values, strict=True):
        np.testing.assert_array_equal(array, value)
    assert "holes of 50 MiB" in caplog.text


def test_weights_without_holes_stay_where_they_are(buffer):
    arrays = [_at(buffer, offset, np.ones(1 << 18, np.float32)) for offset in (0, MIB, 3 * MIB)]
    assert [a is b for a, b in zip(compacted(arrays, _stats), arrays, strict=True)] == [True] * 3


def test_weights_that_do_not_fit_in_what_is_free_stay_where_they_are(buffer):
    arrays = [_at(buffer, offset, np.ones(1 << 18, np.float32)) for offset in (0, 60 * MIB)]
    moved = compacted(arrays, lambda device: {"bytes_limit": 200 * MIB, "bytes_in_use": 100 * MIB})
    assert [a is b for a, b in zip(moved, arrays, strict=True)] == [True] * 2


def test_where_memory_is_the_operating_systems_nothing_is_moved(buffer):
    arrays = [_at(buffer, offset, np.ones(1 << 18, np.float32)) for offset in (0, 60 * MIB)]
    assert [a is b for a, b in zip(compacted(arrays), arrays, strict=True)] == [True] * 2


def test_shards_stay_on_their_devices(monkeypatch):
    mesh = Mesh(np.array(jax.devices()[:2]), ("tensor",))
    sharding = NamedSharding(mesh, PartitionSpec("tensor"))
    arrays = [jax.device_put(np.arange(8.0, dtype=np.float32) + i, sharding) for i in range(3)]
    monkeypatch.setattr("jaxserve.weights.compaction._holes", lambda arrays, device: [40 * MIB])
    moved = compacted(arrays, _stats)
    for i, array in enumerate(moved):
        assert array.sharding == sharding and arrays[i].is_deleted()
        np.testing.assert_array_equal(array, np.arange(8.0, dtype=np.float32) + i)


def test_what_lies_between_regions_of_memory_is_no_hole(buffer, monkeypatch):
    arrays = [_at(buffer, offset, np.ones(1 << 18, np.float32)) for offset in (0, 60 * MIB)]
    monkeypatch.setattr("jaxserve.weights.compaction._holes", lambda arrays, device: [2**46])  # more than a host has
    assert [a is b for a, b in zip(compacted(arrays, _stats), arrays, strict=True)] == [True] * 2
