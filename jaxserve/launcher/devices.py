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


def device_environment(engine: EngineOptions, replica: int, environment: Mapping[str, str], dev: Path = Path("/dev")) -> dict[str, str]:
    """Variables that show a replica its own GPUs only; none with one replica or without GPUs.

    Args:
        environment: of the launcher.
        dev: where the device files are.

    Raises:
        DeviceError: the mesh needs more GPUs than there are.
    """
    if engine.data_size == 1 or environment.get("JAX_PLATFORMS") == "cpu":
        return {}
    gpus = visible_gpus(environment, dev)
    if not gpus:
        return {}
    wanted = engine.data_size * engine.tensor_size
    if wanted > len(gpus):
        raise DeviceError(f"--mesh {engine.mesh} needs {wanted} GPUs; there are {len(gpus)}")
    first = replica * engine.tensor_size
    return {"CUDA_VISIBLE_DEVICES": ",".join(gpus[first : first + engine.tensor_size])}
