"""Which GPUs each engine replica sees."""

import os
from collections.abc import Mapping
from pathlib import Path

from jaxserve.config import EngineOptions
from jaxserve.errors import DeviceError


def visible_gpus(environment: Mapping[str, str], dev: Path = Path("/dev")) -> list[str]:
    """Names of the GPUs, as CUDA_VISIBLE_DEVICES has them.

    Args:
        environment, dev: as for device_environment().
    """
    if (visible := environment.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [gpu.strip() for gpu in visible.split(",") if gpu.strip()]
    return [str(number) for number in range(len([file for file in os.listdir(dev) if file.removeprefix("nvidia").isdigit()]))]


def device_environment(
    engine: EngineOptions, replica: int, environment: Mapping[str, str], dev: Path = Path("/dev"), count: int | None = None
) -> dict[str, str]:
    """Variables that show a replica its own GPUs only; none with one replica or without GPUs.

    Args:
        replica: counted on this host.
        environment: of the launcher.
        dev: where the device files are.
        count: of replicas on this host, where the mesh has others elsewhere.

    Raises:
        DeviceError: the mesh needs more GPUs than there are.
    """
    count = engine.data_size if count is None else count
    if count == 1 or environment.get("JAX_PLATFORMS") == "cpu":
        return {}
    gpus = visible_gpus(environment, dev)
    if not gpus:
        return {}
    wanted = count * engine.tensor_size
    if wanted > len(gpus):
        on_each = "" if count == engine.data_size else " of each host"
        raise DeviceError(f"--mesh {engine.mesh} needs {wanted} GPUs{on_each}; there are {len(gpus)}")
    first = replica * engine.tensor_size
    return {"CUDA_VISIBLE_DEVICES": ",".join(gpus[first : first + engine.tensor_size])}
