"""The GPU of this process, as far as the choice of an attention kernel goes."""

from dataclasses import dataclass

import jax


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
    """The GPU that this process computes on; None: it computes elsewhere."""
    if jax.default_backend() != "gpu":
        return None
    device = jax.local_devices()[0]
    return Gpu(device.core_count, getattr(device, "compute_capability", "") == "9.0")
