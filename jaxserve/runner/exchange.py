"""The devices of a mesh that can read each other's memory, and the buffers through which their kernels then add up (pallas_kernels)."""

import ctypes
import functools
import itertools
import logging
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.pallas_kernels import MAX_SHARDS, ExchangeLayout, peers_table
from jaxserve.runner.config import RunnerConfig

logger = logging.getLogger(__name__)

PEERS_SPEC = PartitionSpec("tensor")
"""How the table of peers lies on the mesh: a row each."""


def reach_each_other(mesh: Mesh) -> bool:
    """Whether the mesh has several GPUs, all of this process, which can access each other's memory: then XLA has switched that on."""
    devices = list(mesh.devices.flat)
    if not 2 <= len(devices) <= MAX_SHARDS or devices[0].platform != "gpu" or len(mesh.local_devices) < len(devices):
        return False
    return all(_can_access(a.local_hardware_id, b.local_hardware_id) for a, b in itertools.permutations(devices, 2))


def exchange_bytes(mesh: Mesh, config: RunnerConfig) -> int:
    """What an Exchange takes of each device's memory, where there will be one."""
    return ExchangeLayout.of(mesh.shape["tensor"]).nbytes if config.peer_memory and reach_each_other(mesh) else 0


@functools.cache
def _can_access(device: int, peer: int) -> bool:
    """Ask CUDA's driver; the ordinals are of the devices that this process sees."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    answer = ctypes.c_int(0)
    failed = driver.cuDeviceCanAccessPeer(ctypes.byref(answer), device, peer)
    reached = not failed and bool(answer.value)
    if not reached:
        logger.warning("GPU %d cannot access GPU %d's memory (CUDA error %d): XLA adds up over them, which is slower", device, peer, failed)
    return reached


class Exchange:
    """One buffer a device, for life.

    Args:
        mesh: whose devices reach each other.

    Attributes:
        peers: the table that programs take.
    """

    def __init__(self, mesh: Mesh):
        shards, sharding = mesh.shape["tensor"], NamedSharding(mesh, PEERS_SPEC)
        layout = ExchangeLayout.of(shards)
        empty = jax.shard_map(layout.empty, mesh=mesh, in_specs=(), out_specs=PEERS_SPEC, check_vma=False)
        # Never donated, never freed while programs run: kernels write to it by its address.
        self._buffers = jax.block_until_ready(jax.jit(empty)())
        parts: dict[Any, jax.Array] = {shard.device: shard.data for shard in self._buffers.addressable_shards}
        table = peers_table([parts[device].unsafe_buffer_pointer() for device in mesh.devices.flat])
        self.peers = jax.make_array_from_callback(table.shape, sharding, lambda index: np.asarray(table[index]))
