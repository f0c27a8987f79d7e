"""How much memory a KV cache may take."""

from typing import Any

import psutil
from jax.sharding import Mesh

from jaxserve.errors import DeviceError

# CUDA graphs, the workspaces of libraries and fragments live beside what XLA's memory analysis counts.
GPU_MARGIN = 512 * 2**20


# A few bytes more or less in use must not change the size of the cache, and with it every program.
_STEP = 4 * 2**20


def kv_cache_bytes(mesh: Mesh, wanted: int | None, weights_to_come: int) -> int:
    """Memory for the KV cache, and the temporaries beside it, on each device of a mesh.

    Args:
        mesh: the devices.
        wanted: the user's budget; None: all that is left, rounded down.
        weights_to_come: bytes that will be loaded on each device.

    Raises:
        DeviceError: nothing is left.
    """
    left = min(_bytes_left(device, len(mesh.local_devices), weights_to_come) for device in mesh.local_devices)
    if left <= 0:
        raise DeviceError("no memory is left for the KV cache beside the weights")
    return left // _STEP * _STEP if wanted is None else min(wanted, left)


def _bytes_left(device: Any, num_sharing: int, weights_to_come: int) -> int:
    stats = device.memory_stats()
    if stats is not None and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"] - GPU_MARGIN - weights_to_come
    # The host's memory is not jaxserve's alone: half of what is available.
    return (psutil.virtual_memory().available // num_sharing - weights_to_come) // 2
