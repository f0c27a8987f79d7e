"""Products with quantized weights on a CPU, beside float32: microseconds a matrix.

    python -m benchmarks.quantized_cpu

Matrices of the demo model's feed-forward network, enough of them that they come from memory.
"""

import argparse
import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.models.formats.gguf import BLOCK_TYPES
from jaxserve.models.formats.on_load import SCHEMES
from jaxserve.pallas_kernels import Layout, matmul, pack, quantized_matmul, weight_of

LAYOUTS = {name: kind.layout for name, kind in BLOCK_TYPES.items()} | {name: scheme.layout for name, scheme in SCHEMES.items()}
LAYOUTS |= {"GPTQ": Layout("int4", 64, "zero", "float16")}


def make(layout: Layout, rows: int, columns: int, seed: int) -> dict[str, jax.Array]:
    """Arrays of random codes."""
    random = np.random.default_rng(seed)
    low, high = (-8, 8) if layout.code == "int4" else (0, 16) if layout.bits == 4 else (-127, 128)
    made: dict[str, jax.Array] = {}
    for name, shape in layout.unpacked_shapes(rows, columns).items():
        values = random.integers(low, high, shape.shape) if name in ("codes", "zeros") else random.uniform(0.01, 0.02, shape.shape)
        made[name] = jnp.asarray(values.astype(np.float32)).astype(shape.dtype)
    return pack(made, layout)


def measure(product: Callable[..., jax.Array], x: jax.Array, matrices: list[dict[str, jax.Array]]) -> float:
    """Seconds a matrix, the best of some runs."""

    @jax.jit
    def run(x: jax.Array, matrices: list[dict[str, jax.Array]]) -> jax.Array:
        for arrays in matrices:
            x = x + product(x, arrays)[:, :1] * 1e-9  # one after the other
        return x

    run(x, matrices).block_until_ready()
    best = float("inf")
    for _ in range(7):
        begin = time.perf_counter()
        run(x, matrices).block_until_ready()
        best = min(best, time.perf_counter() - begin)
    return best / len(matrices)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=3072)
    parser.add_argument("--columns", type=int, default=576)
    parser.add_argument("--matrices", type=int, default=24)
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 8, 64, 512])
    args = parser.parse_args()
    random = np.random.default_rng(0)
    dense = [{"weight": jnp.asarray(random.standard_normal((args.rows, args.columns)), jnp.float32)} for _ in range(args.matrices)]
    kinds: dict[str, tuple[Callable[..., jax.Array], list[dict[str, jax.Array]]]] = {
        "float32": (lambda x, arrays: matmul(x, arrays["weight"], x.dtype), dense)
    }

    def multiply(x: jax.Array, arrays: dict[str, jax.Array], layout: Layout) -> jax.Array:
        return quantized_matmul(x, weight_of(arrays, layout, args.columns), x.dtype)

    for name, layout in LAYOUTS.items():
        matrices = [make(layout, args.rows, args.columns, seed) for seed in range(args.matrices)]
        kinds[name] = functools.partial(multiply, layout=layout), matrices
    print("us a matrix".ljust(18), *(f"T={count}".rjust(8) for count in args.tokens))
    for name, (product, matrices) in kinds.items():
        xs = (jnp.asarray(random.standard_normal((count, args.columns)), jnp.float32) for count in args.tokens)
        print(name.ljust(18), *(f"{measure(product, x, matrices) * 1e6:8.0f}" for x in xs), flush=True)


if __name__ == "__main__":
    main()
