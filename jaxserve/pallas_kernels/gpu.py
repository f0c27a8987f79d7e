"""The GPU that a program is for, as far as the choice of kernels goes."""

import re
from dataclasses import dataclass

import jax

# NVIDIA's parts of compute capability 9.0, as their names have it.
_HOPPER = re.compile(r"\bG?H(20|100|200|800)\b")


@dataclass(frozen=True)
class Gpu:
    """What the choice of a kernel depends on.

    Attributes:
        num_multiprocessors: of the device.
        is_hopper: whether it is of the Hopper kind (sm_90), and Mosaic's kernels may be taken.
        only_mosaic: take them also where Triton's are faster.
    """

    num_multiprocessors: int
    is_hopper: bool
    only_mosaic: bool = False


def local_gpu() -> Gpu | None:
    """The GPU that what is being traced will run on; None: no GPU.

    Under a mesh it is the mesh's device, which need not be of this process: programs are also lowered where there is no GPU.
    Elsewhere it is the device that this process computes on.
    """
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is not None:
        return Gpu(described.num_cores, bool(_HOPPER.search(described.device_kind))) if described.platform == "gpu" else None
    if jax.default_backend() != "gpu":
        return None
    device = jax.local_devices()[0]
    return Gpu(device.core_count, getattr(device, "compute_capability", "") == "9.0")
