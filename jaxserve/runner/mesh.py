"""The devices of one engine replica, with named axes."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxserve.errors import DeviceError


def make_mesh(tensor_size: int, data_index: int = 0, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of a replica: axes ("data", "tensor"), one by `tensor_size`.

    Args:
        tensor_size: devices a replica.
        data_index: which replica: it takes the devices from data_index * tensor_size on.
        devices: to choose from; None: this process's own.

    Raises:
        DeviceError: there are too few.
    """
    devices = jax.local_devices() if devices is None else devices
    mine = devices[data_index * tensor_size : (data_index + 1) * tensor_size]
    if len(mine) < tensor_size:
        needed, there = (data_index + 1) * tensor_size, len(devices)
        raise DeviceError(
            f"replica {data_index} of {tensor_size} devices (--mesh Dx{tensor_size}, --num-shard {tensor_size}) needs {needed} devices;"
            f" there {'is' if there == 1 else 'are'} {there} ({devices[0].device_kind})"
        )
    return Mesh(np.array(mine, dtype=object).reshape(1, tensor_size), ("data", "tensor"))
