"""How much memory a KV cache may take."""

import resource
from typing import Any

import jax.numpy as jnp
import psutil
from jax.sharding import Mesh

from jaxserve.errors import DeviceError
from jaxserve.runner.blueprint import Blueprint
from jaxserve.runner.programs import num_scored_a_call

# CUDA graphs, the workspaces of libraries and fragments live beside what XLA's memory analysis counts.
GPU_MARGIN = 512 * 2**20


_WORKSPACE = 128 * 2**20  # of cuBLAS, and what is small

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


def peak_memory(mesh: Mesh) -> str:
    """For people: the most that this process has held so far, on the host and on each of its devices that tells it."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in mesh.local_devices]
    told = [f"{peak / 2**30:.1f}" for peak in peaks if peak is not None]
    return f"host {host / 2**30:.1f} GiB" + (f", devices {', '.join(told)} GiB" if told else "")


def _bytes_left(device: Any, num_sharing: int, weights_to_come: int) -> int:
    stats = device.memory_stats()
    if stats is not None and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"] - GPU_MARGIN - weights_to_come
    # The host's memory is not jaxserve's alone: half of what is available.
    return (psutil.virtual_memory().available // num_sharing - weights_to_come) // 2


def expected_temporaries(blueprint: Blueprint) -> int:
    """Bytes on a device that programs are expected to take for temporaries at most; the largest program, once compiled, tells the truth.

    A step of the most tokens has gate and up's products beside SwiGLU's, or attention's inputs, and the residual stream twice; where
    matrices are quantized, the largest one as the products take it. Whoever scores prompts has logits, and their exponentials.
    """
    model, shards = blueprint.model, blueprint.tensor_size
    itemsize = jnp.dtype(blueprint.dtype).itemsize
    heads = model.num_heads // shards + 2 * model.local_kv_heads(shards)
    columns = max(3 * model.intermediate_size // shards, 2 * heads * model.head_dim) + 2 * model.hidden_size
    step = blueprint.max_batch_tokens * columns * itemsize
    weight = 2 * model.intermediate_size // shards * model.hidden_size * itemsize if model.quantization else 0
    scores = 2 * num_scored_a_call(blueprint.device_platform) * model.vocab_size * 4
    workspace = _WORKSPACE if blueprint.device_platform == "gpu" else 0
    return -(-(max(step + weight, scores) + workspace) // _STEP) * _STEP
