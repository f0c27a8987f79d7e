"""Speed of the decoder layer's small kernels on this GPU, beside plain XLA: `python -m benchmarks.layer_kernels`.

A figure is what the kernels of one call take on the device, from a trace of a few calls inside one jit, with barriers between them over
which XLA does not fuse; and how many kernels that are, since each costs a launch besides. Outputs are compared with the reference's first.
What XLA fuses into the matrix products around them is not in these figures: a whole step tells (docs/performance_gpu.md).
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.bench.profile import read_trace
from jaxserve.pallas_kernels import AttentionMetadata, local_gpu, make_layer_kv
from jaxserve.pallas_kernels.add_rms_norm.reference import add_rms_norm_reference
from jaxserve.pallas_kernels.add_rms_norm.triton import AddRMSNormConfig, add_rms_norm_triton
from jaxserve.pallas_kernels.rotate_and_write_kv.reference import rotate_and_write_kv_reference
from jaxserve.pallas_kernels.rotate_and_write_kv.triton import RotateConfig, rotate_and_write_kv_triton

TOKENS = (1, 64, 256, 8192)
CALLS = 8
EPS = 1e-5
READ_FLOOR_TBPS = 4.5  # measured on an H200: a sum over an array


class Model(NamedTuple):
    """What of a model's shape the kernels see."""

    name: str
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


MODELS = Model("8b", 4096, 32, 8, 128), Model("1b", 2048, 32, 8, 64)


class Step(NamedTuple):
    """An operation as (carry, one of the inputs) -> carry, what it starts with, and the bytes that a call must move."""

    function: Callable[[Any, Any], Any]
    carry: Any
    inputs: tuple[Any, ...]
    num_bytes: int


def norm_step(function: Callable[..., Any], model: Model, num_tokens: int) -> Step:
    """`add_rms_norm` of its own results."""
    x, residual = (_normal(i, (num_tokens, model.hidden_size)) for i in range(2))
    return Step(lambda carry, weight: function(*carry, weight, EPS), (x, residual), (_normal(2, x.shape[1:]),), 4 * x.nbytes)


def rotate_step(function: Callable[..., Any], model: Model, num_tokens: int, kv_dtype: str = "bfloat16") -> Step:
    """`rotate_and_write_kv` of one projection after the other into the same pages."""
    num_pages = -(-num_tokens // 16) + 64
    place = np.random.default_rng(0).permutation(num_pages * 16)[:num_tokens]
    unused = jnp.zeros((1,), jnp.int32)
    pages, offsets = (jnp.asarray(x, jnp.int32) for x in (place // 16, place % 16))
    metadata = AttentionMetadata(unused[None], unused, unused, pages, offsets)
    angles = jax.random.uniform(jax.random.key(0), (num_tokens, 1, model.head_dim // 2), maxval=6.28)
    rotation = jnp.cos(angles), jnp.sin(angles)
    kv = make_layer_kv(num_pages, 16, model.num_kv_heads, model.head_dim, jnp.dtype(kv_dtype))
    columns = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    inputs = tuple((_normal(i, (num_tokens, columns)), rotation, metadata) for i in range(4))

    def call(carry, qkv_rotation_metadata):
        qkv, rotation, metadata = qkv_rotation_metadata
        return function(qkv, rotation, carry[1], metadata, bias=None, norms=None, eps=EPS, dtype=q.dtype)

    q = jnp.zeros((num_tokens, model.num_heads, model.head_dim), jnp.bfloat16)
    written = num_tokens * model.num_kv_heads * model.head_dim * 2 * kv[0].dtype.itemsize
    return Step(call, (q, kv), inputs, inputs[0][0].nbytes + q.nbytes + written)


def _normal(seed: int, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def add_rms_norm(x, residual, weight, eps):
    """The kernel, however many tokens."""
    return add_rms_norm_triton(x, residual, weight, eps, config=AddRMSNormConfig.suited(x))


def rotate_and_write_kv(qkv, rotation, kv, metadata, **options):
    """The kernel."""
    return rotate_and_write_kv_triton(qkv, rotation, kv, metadata, config=RotateConfig.suited(qkv, kv), **options)


class Figure(NamedTuple):
    """Of one call: microseconds on the device, and kernels."""

    microseconds: float
    num_kernels: float


def measure(step: Step) -> Figure:
    """Trace CALLS calls that follow each other, after a run to warm up."""
    function = jax.jit(step.function)

    def chain(carry, inputs):
        results = []
        for i in range(CALLS):
            carry, argument = jax.lax.optimization_barrier((carry, inputs[i % len(inputs)]))
            carry = function(carry, argument)
            results.append(carry[0])  # what nobody reads would not be computed
        return carry, results

    compiled = jax.jit(chain, donate_argnums=0).lower(step.carry, step.inputs).compile()
    jax.block_until_ready(compiled(jax.tree.map(jnp.copy, step.carry), step.inputs))
    carry = jax.block_until_ready(jax.tree.map(jnp.copy, step.carry))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(compiled(carry, step.inputs))
        _, kernels = read_trace(Path(folder))
    return Figure(sum(kernel.duration for kernel in kernels) / 1e3 / CALLS, len(kernels) / CALLS)


def relative_error(got: Any, expected: Any) -> float:
    """The largest relative L2 distance of two trees of arrays."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    wide = ((x.astype(jnp.float32), y.astype(jnp.float32)) for x, y in pairs)
    return max(float(jnp.linalg.norm(x - y) / jnp.linalg.norm(y)) for x, y in wide)


def main() -> None:
    if local_gpu() is None:
        sys.exit("benchmarks.layer_kernels needs an NVIDIA GPU")
    operations = (norm_step, add_rms_norm, add_rms_norm_reference), (rotate_step, rotate_and_write_kv, rotate_and_write_kv_reference)
    wrong = False
    for make, kernel, reference in operations:
        for model in MODELS:
            for num_tokens in TOKENS:
                steps = [make(function, model, num_tokens) for function in (kernel, reference)]
                error = relative_error(*(jax.jit(step.function)(step.carry, step.inputs[0]) for step in steps))
                ours, xla = map(measure, steps)
                floor = steps[0].num_bytes / READ_FLOOR_TBPS / 1e6
                name = f"{kernel.__name__}_{model.name}_t{num_tokens}"
                rival = f"XLA {xla.microseconds:7.2f} us in {xla.num_kernels:.1f} kernels"
                print(f"{name:32s} {ours.microseconds:7.2f} us, {rival}, bytes alone {floor:6.2f} us  error {error:.1e}", flush=True)
                wrong |= not error < 4e-3
    if wrong:
        sys.exit("some output is far from the reference")


if __name__ == "__main__":
    main()
