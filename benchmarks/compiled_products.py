"""Whether this GPU's compiler leaves 8-bit weights where they lie: `python -m benchmarks.compiled_products`, a few seconds.

A product with activations of 8 bits has to be one call of cuBLASLt that reads the weight [N, K] itself: a weight that is transposed,
copied or widened before is read twice a step and takes memory of its own. What jaxserve hands over can be seen anywhere (tests); what
the compiler makes of it, only where there is one for GPUs. The last line says whether all products are as they should be, as does the
exit code.
"""

import re
import sys
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels import quantized_matmul, quantized_matmul_parts
from jaxserve.pallas_kernels.gpu import local_gpu
from jaxserve.pallas_kernels.quantized_matmul import EightBitWeight
from jaxserve.runner.programs import PRODUCTS

SIZE, DEPTH, NUM_TOKENS = 6144, 4096, 512  # q, k and v of the 8B
CALLS = {"float8_e4m3fn": "__cublas$lt$matmul$f8", "int8": "__cublas$lt$matmul"}
_SHAPED = re.compile(rf"%(\S+) = \w+\[(?:{SIZE},{DEPTH}|{DEPTH},{SIZE})\]\S* ([\w-]+)\(")


def faults(text: str, call: str) -> list[str]:
    """What an optimized program (HLO) of one product does beside, or in place of, a call that reads the weight's parameter."""
    entry = text[text.rindex("\nENTRY ") :]
    weights = {name for name, operation in _SHAPED.findall(entry) if operation == "parameter"}
    found = [f"{name} is a {operation} of the weight's shape" for name, operation in _SHAPED.findall(text) if operation != "parameter"]
    calls = re.findall(r'custom-call\(([^)]*)\), custom_call_target="(__cublas[^"]*)"', entry)
    if [target for _, target in calls] != [call]:
        found.append(f"calls of cuBLAS: {[target for _, target in calls]}, not {call}")
    elif weights.isdisjoint(re.findall(r"%([^\s,]+)", calls[0][0])):
        found.append(f"{call} does not read the weight's parameter")
    return found


def check_products(compiled_text: Callable[..., str], dtypes: list[str], say: Callable[[str], None]) -> bool:
    """Whether products with weights of these dtypes, as served, are without fault.

    Args:
        compiled_text: of a function and jax.ShapeDtypeStructs of its arguments, the optimized HLO for the GPU.
    """
    good = True
    for dtype in dtypes:
        weight = jax.eval_shape(
            lambda dtype=dtype: EightBitWeight(jnp.zeros((SIZE, DEPTH), dtype), jnp.zeros((1, SIZE)), quantized_activations=True)
        )
        for product in (multiply, quantized_matmul_parts):
            x = jax.ShapeDtypeStruct((NUM_TOKENS, DEPTH), jnp.bfloat16)
            found = faults(compiled_text(product, x, weight), CALLS[dtype])
            say(f"{dtype} {product.__name__}: {'; '.join(found) or CALLS[dtype]}")
            good &= not found
    return good


def multiply(x: jax.Array, weight: EightBitWeight) -> jax.Array:
    """The product that XLA rounds the activations of; a kernel of ours does it for `quantized_matmul_parts`."""
    return quantized_matmul(x, weight, x.dtype)


def main() -> None:
    """Compile and read."""
    gpu = local_gpu()
    if gpu is None:
        sys.exit("compiled_products: there is no GPU")
    warnings.simplefilter("ignore", DeprecationWarning)  # Pallas-Triton is deprecated

    def compiled_text(product: Callable[..., jax.Array], *arguments: object) -> str:
        return jax.jit(product).lower(*arguments).compile(PRODUCTS).as_text() or ""

    good = check_products(compiled_text, [dtype for dtype in CALLS if gpu.is_hopper or dtype == "int8"], print)
    print("as they should be" if good else "NOT as they should be")
    sys.exit(not good)


if __name__ == "__main__":
    main()
