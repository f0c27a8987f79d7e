"""What `benchmarks.quantized_matmuls` multiplies: tokens, and weights of 4, 8 and 16 bits of the shapes of Llama-3.1-8B."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels.quantized_matmul.layout import TABLES
from jaxserve.pallas_kernels.quantized_matmul.weights import EightBitWeight, FourBitWeight

BF16 = jnp.bfloat16
READ_FLOOR_TBPS = 4.5  # measured on an H200: a sum over an array
TENSOR_TFLOPS = {"fp8": 1630, "int8": 1630}  # of others 815
# Of 8 bits whose activations are not rounded, as --quantize eetq, GPTQ with 8 bits, float8 in blocks and GGUF's Q8_0 have them: groups.
UNROUNDED = {"eetq": 0, "w8z": 128, "fp8b": 128, "q8_0": 32}
# Of 4 bits with a table or with minima, as --quantize bitsandbytes-nf4 and -fp4, MXFP4 and GGUF's Q4_1 and Q4_K have them: columns of a
# group, dtype of scales, table.
UNEVEN: dict[str, tuple[int, str, str | None]] = {
    "nf4": (64, "float32", "nf4"),
    "fp4": (64, "float32", "fp4"),
    "mxfp4": (32, "bfloat16", "e2m1"),
    "q4_1": (32, "float16", None),
    "q4_k": (32, "float32", None),
}
SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336), "head": (128256, 4096)}  # [N, K]
SHAPES["swiglu"] = SHAPES["gate_up"]  # with silu(gate) * up


@dataclass(frozen=True)
class Case:
    """Tokens times a weight of a kind and shape."""

    kind: str
    shape: str
    tokens: int

    def floor(self, weight_bytes: int) -> float:
        """Seconds below which no kernel can be."""
        size, depth = SHAPES[self.shape]
        return max(weight_bytes / READ_FLOOR_TBPS / 1e12, 2 * self.tokens * size * depth / TENSOR_TFLOPS.get(self.kind, 815) / 1e12)


@functools.partial(jax.jit, static_argnames=("kind", "size", "depth"))
def make_weight(seed: jax.Array, kind: str, size: int, depth: int) -> Any:
    """A random weight [N, K] of a kind."""
    keys = jax.random.split(jax.random.key(seed), 3)

    def scales(groups: int, dtype: Any) -> jax.Array:
        return (jax.random.uniform(keys[0], (groups, size), jnp.float32, 0.5, 1.5) * 0.01).astype(dtype)

    if kind in UNEVEN:
        group, dtype, table = UNEVEN[kind]
        codes, of_groups = jax.random.bits(keys[2], (depth // 128, size, 32), jnp.uint16), scales(depth // group, jnp.dtype(dtype))
        if table is None:  # minima, and counted from 0
            return FourBitWeight(
                codes, of_groups, minima=-of_groups * jnp.asarray(7.5, of_groups.dtype), values=tuple(map(float, range(16)))
            )
        return FourBitWeight(codes, of_groups, values=tuple(TABLES[table].tolist()))
    if kind.startswith("w4"):
        groups = depth // (32 if kind == "w4g32" else 128)
        zeros = jax.random.randint(keys[1], (groups, size), 0, 16, jnp.int32).astype(jnp.uint8) if kind == "w4z" else None
        return FourBitWeight(jax.random.bits(keys[2], (depth // 128, size, 32), jnp.uint16), scales(groups, jnp.float16), zeros)
    if kind == "bf16":
        return jax.random.normal(keys[2], (size, depth), BF16)
    if kind in ("fp8", "fp8b"):
        codes = jax.random.normal(keys[2], (size, depth), BF16).astype(jnp.float8_e4m3fn)
    else:
        codes = jax.lax.bitcast_convert_type(jax.random.bits(keys[2], (size, depth), jnp.uint8), jnp.int8)
    if kind in UNROUNDED:
        groups = depth // UNROUNDED[kind] if UNROUNDED[kind] else 1
        zeros = jax.random.randint(keys[1], (groups, size), -127, 129, jnp.int32).astype(jnp.int16) if kind == "w8z" else None
        return EightBitWeight(codes, scales(groups, jnp.float16 if kind in ("w8z", "q8_0") else jnp.float32), zeros)
    return EightBitWeight(codes, scales(1, jnp.float32), quantized_activations=True)


def weight_bytes(kind: str, shape: str) -> int:
    """Bytes of a weight of a kind, with its scales."""
    abstract = jax.eval_shape(lambda: make_weight(jnp.int32(0), kind, *SHAPES[shape]))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
