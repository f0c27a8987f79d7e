"""How much memory a KV cache may take."""

from typing import Any

import psutil
from jax.sharding import Mesh

from jaxserve.errors import DeviceError

# CUDA graphs, the workspaces of libraries and fragments live beside what XLA's memory analysis counts.
GPU_MARGIN = 512 * 2**20


def kv_cache_bytes(mesh: Mesh, wanted: int | None, temporaries: int) -> int:
    """Memory for the KV cache on each device of a mesh whose weights are loaded.

    Args:
        mesh: the devices.
        wanted: the user's budget; None: all that is left.
        temporaries: bytes that the largest program needs while it runs.

    Raises:
        DeviceError: nothing is left.
    """
    left = min(_bytes_left(device, mesh.size) - temporaries for device in mesh.local_devices)
    if left <= 0:
        raise DeviceError("no memory is left for the KV cache after the weights and the largest program's temporaries")
    return left if wanted is None else min(wanted, left)


def _bytes_left(device: Any, num_sharing: int) -> int:
    stats = device.memory_stats()
    if stats is not None and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"] - GPU_MARGIN
    # The host's memory is not jaxserve's alone: half of what is available.
    return psutil.virtual_memory().available // 2 // num_sharing
