"""Speed of a decode step's products on this GPU, ours beside XLA's and the floor: `python -m benchmarks.matmuls [--tokens 64 128]`.

A figure is the time of one product in a chain inside one jit: each has a weight of its own (more of them than the L2 cache holds),
and its tokens come from the product before by one small fusion (about 2 us, in the figure). Outputs are compared
with float32 on 256 random columns.
"""

import argparse
import functools
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.pallas_kernels.matmul.mosaic import MosaicMatmulConfig, matmul_mosaic

READ_FLOOR_TBPS = 4.5  # measured on an H200: a sum over an array
SHAPES = {
    "8b_qkv": (6144, 4096),
    "8b_o": (4096, 4096),
    "8b_gate_up": (28672, 4096),
    "8b_down": (4096, 14336),
    "1b_gate_up": (16384, 2048),
    "1b_down": (2048, 8192),
}  # [N, K]


def multiply_xla(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [T, K], weight [N, K] -> [T, N]."""
    return jax.lax.dot_general(x, weight, (((1,), (1,)), ((), ())))


def multiply_ours(x: jax.Array, weight: jax.Array) -> jax.Array | None:
    """The same by the kernel, with the served cut; None where nothing is served."""
    config = MosaicMatmulConfig.suited(x, weight, jax.local_devices()[0].core_count)
    return None if config is None else matmul_mosaic(x, weight, config=config).astype(jnp.float32).sum(axis=0).astype(x.dtype)


@functools.partial(jax.jit, static_argnums=1)
def _normal(seed: int, shape: tuple[int, int]) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def seconds_and_error(multiply, num_tokens: int, size: int, depth: int) -> tuple[float, float]:
    """Median seconds of a product in a chain, and its relative L2 error."""
    num_weights = max(3, -(-300_000_000 // (2 * size * depth)))
    num_products = max(num_weights, 24 if size * depth < 3e7 else 12)
    seed = time.time_ns() % 2**30
    x, weights = _normal(seed, (num_tokens, depth)), [_normal(seed + 1 + i, (size, depth)) for i in range(num_weights)]
    product = jax.jit(multiply)

    @jax.jit
    def chain(x, weights):
        outputs = []
        for i in range(num_products):
            outputs.append(product(x, weights[i % num_weights]))
            x = x * 0.5 + jnp.tile(outputs[-1], (1, -(-depth // size)))[:, :depth] * 0.01
        return x, outputs[0]

    poison = jnp.full((1 << 26,), jnp.nan, jnp.float32).block_until_ready()
    del poison
    columns = np.random.default_rng(seed).integers(0, size, 256)
    expected = np.asarray(x, np.float32) @ np.asarray(weights[0][columns], np.float32).T
    got = np.asarray(chain(x, weights)[1], np.float32)[:, columns]
    times = []
    for _ in range(9):
        started = time.perf_counter()
        jax.block_until_ready([chain(x, weights) for _ in range(4)])
        times.append((time.perf_counter() - started) / 4 / num_products)
    return statistics.median(times), float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def main() -> None:
    """Print a line a shape and number of tokens."""
    parser = argparse.ArgumentParser(description="Speed of a decode step's products on this GPU.")
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--only", nargs="+", choices=SHAPES, default=list(SHAPES), help="shapes")
    arguments = parser.parse_args()
    if jax.default_backend() != "gpu":
        sys.exit("no GPU")
    wrong = False
    for num_tokens in arguments.tokens:
        for name in arguments.only:
            size, depth = SHAPES[name]
            line = f"{name:12s} T={num_tokens:3d} floor {2e6 * size * depth / READ_FLOOR_TBPS / 1e12:6.1f} us"
            tokens, weight = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((num_tokens, depth), (size, depth)))
            for contender, multiply in (("xla", multiply_xla), ("ours", multiply_ours)):
                if jax.eval_shape(multiply, tokens, weight) is None:
                    line += f"  {contender}: not served"
                    continue
                seconds, error = seconds_and_error(multiply, num_tokens, size, depth)
                line += f"  {contender} {seconds * 1e6:6.1f} us, error {error:.1e}"
                wrong |= not error < 2.5e-3
            print(line, flush=True)
    if wrong:
        sys.exit("some output is far from float32's")


if __name__ == "__main__":
    main()
