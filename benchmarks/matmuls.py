"""Speed of a decode step's products on this GPU, as served beside XLA's: `python -m benchmarks.matmuls [--tokens 8 64 256]`.

A figure is what the kernels of one product take on the device, from a trace of calls with a weight each, more of them than the L2 cache
holds. Gate and up are measured with SwiGLU, as a step needs them; products that leave parts, without the sum that their reader does.
Outputs are compared with float32 on 128 random columns.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.stages import Compiled

from jaxserve.bench.profile import Kernel, read_trace
from jaxserve.pallas_kernels import gated_matmul, matmul_parts, multiply_gated

READ_FLOOR_TBPS, MULTIPLY_FLOOR_TFLOPS = 4.5, 815  # measured on an H200: a sum over an array, a large product
SHAPES = {
    "8b_qkv": (6144, 4096),
    "8b_o": (4096, 4096),
    "8b_gate_up": (28672, 4096),
    "8b_down": (4096, 14336),
    "1b_qkv": (3072, 2048),
    "1b_o": (2048, 2048),
    "1b_gate_up": (16384, 2048),
    "1b_down": (2048, 8192),
}  # [N, K]
REPETITIONS = 3
PAUSE_MS = 3  # between calls, by which the trace is taken apart
CUBLAS = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0}  # as the runner compiles steps


def multiply_xla(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [T, K], weight [N, K] -> [T, N]."""
    return jax.lax.dot_general(x, weight, (((1,), (1,)), ((), ())))


def contenders(gated: bool) -> dict[str, Callable[[jax.Array, jax.Array], jax.Array]]:
    """By name, what multiplies x [T, K] and a weight [N, K], with SwiGLU or without: XLA, and what is served."""
    if gated:
        return {"xla": lambda x, weight: multiply_gated(multiply_xla(x, weight)), "served": gated_matmul}
    return {"xla": multiply_xla, "served": matmul_parts}


def relative_error(out: jax.Array, x: jax.Array, weight: jax.Array) -> float:
    """Relative L2 error of some columns of a product, whose parts may not have been added up."""
    columns = np.random.default_rng(time.time_ns()).integers(0, out.shape[-1], 128)
    got = np.asarray(out)[..., columns].astype(np.float32).reshape(-1, x.shape[0], len(columns)).sum(axis=0)
    wide = np.asarray(x, np.float32)
    expected = wide @ np.asarray(weight[columns], np.float32).T
    if out.shape[-1] != weight.shape[0]:
        up = wide @ np.asarray(weight[columns + out.shape[-1]], np.float32).T
        expected = expected / (1 + np.exp(-expected)) * up
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def calls_of(kernels: list[Kernel]) -> Iterator[list[Kernel]]:
    """The kernels of each call, taken apart by the pauses between them."""
    call: list[Kernel] = []
    for kernel in sorted(kernels):
        if call and kernel.start > call[-1].start + call[-1].duration + PAUSE_MS * 1e6 / 2:
            yield call
            call = []
        call.append(kernel)
    yield call


def measure(programs: list[Compiled], x: jax.Array, weights: list[jax.Array]) -> list[float]:
    """Microseconds of a product on the device, for each program that multiplies x by all the weights."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = options.host_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            for program in programs * REPETITIONS:
                jax.block_until_ready(program(x, weights))
                time.sleep(PAUSE_MS / 1e3)
        _, kernels = read_trace(Path(folder))
    times = [sum(kernel.duration for kernel in call) / 1e3 / len(weights) for call in calls_of(kernels)]
    if len(times) != len(programs) * REPETITIONS:
        sys.exit(f"the trace shows {len(times)} calls where {len(programs) * REPETITIONS} ran")
    return [min(times[i :: len(programs)]) for i in range(len(programs))]


def main() -> None:
    """Print a line a shape and number of tokens."""
    parser = argparse.ArgumentParser(description="Speed of a decode step's products on this GPU.")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8, 64, 128, 256])
    parser.add_argument("--only", nargs="+", choices=SHAPES, default=list(SHAPES), help="shapes")
    arguments = parser.parse_args()
    if jax.default_backend() != "gpu":
        sys.exit("no GPU")
    normal = jax.jit(lambda seed, shape: jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16), static_argnums=1)
    wrong = False
    for name in arguments.only:
        size, depth = SHAPES[name]
        seed = time.time_ns() % 2**30
        weights = [
            normal(seed + i, (size, depth)) * jnp.bfloat16(depth**-0.5) for i in range(max(3, -(-200_000_000 // (2 * size * depth))))
        ]
        for num_tokens in arguments.tokens:
            x = normal(seed - num_tokens, (num_tokens, depth))
            line = f"{name:12s} T={num_tokens:3d}"
            programs = []
            for contender, multiply in contenders(name.endswith("gate_up")).items():
                chain = jax.jit(lambda x, weights, multiply=multiply: [multiply(x, weight) for weight in weights], compiler_options=CUBLAS)
                programs.append(chain.lower(x, weights).compile())
                error = relative_error(programs[-1](x, weights)[0], x, weights[0])
                wrong |= not error < 4e-3
                line += f"  {contender} error {error:.1e},"
            floor = 2e-6 * size * depth * max(1 / READ_FLOOR_TBPS, num_tokens / MULTIPLY_FLOOR_TFLOPS)
            xla, served = measure(programs, x, weights)
            print(f"{line} xla {xla:6.1f} us, served {served:6.1f} us, floor {floor:6.1f} us", flush=True)
    if wrong:
        sys.exit("some output is far from float32's")


if __name__ == "__main__":
    main()
