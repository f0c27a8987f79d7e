"""The devices of one engine replica, with named axes."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxserve.errors import DeviceError


def make_mesh(tensor_size: int, data_index: int = 0, devices: Sequence[Any] | None = None, num_hosts: int = 1) -> Mesh:
    """The mesh of a replica: axes ("data", "tensor"), one by `tensor_size`.

    Args:
        tensor_size: devices a replica.
        data_index: which replica: it takes the devices from data_index * tensor_size on.
        devices: to choose from; None: this process's own.
        num_hosts: that share the mesh evenly, each in a process of JAX's; they have one replica.

    Raises:
        DeviceError: there are too few.
    """
    if num_hosts > 1:
        devices = _of_all_hosts(tensor_size // num_hosts, num_hosts)
    devices = jax.local_devices() if devices is None else devices
    mine = devices[data_index * tensor_size : (data_index + 1) * tensor_size]
    if len(mine) < tensor_size:
        needed, there = (data_index + 1) * tensor_size, len(devices)
        raise DeviceError(
            f"replica {data_index} of {tensor_size} devices (--mesh Dx{tensor_size}, --num-shard {tensor_size}) needs {needed} devices;"
            f" there {'is' if there == 1 else 'are'} {there} ({devices[0].device_kind})"
        )
    return Mesh(np.array(mine, dtype=object).reshape(1, tensor_size), ("data", "tensor"))


def _of_all_hosts(num_each: int, num_hosts: int) -> list[Any]:
    """The first devices of each host, host by host."""
    devices = []
    for host in range(num_hosts):
        theirs = sorted((device for device in jax.devices() if device.process_index == host), key=lambda device: device.id)
        if len(theirs) < num_each:
            raise DeviceError(f"the mesh needs {num_each} devices on each host, host {host} has {len(theirs)} ({theirs[0].device_kind})")
        devices += theirs[:num_each]
    return devices
