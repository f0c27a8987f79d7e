"""Who computes a product in `benchmarks.quantized_matmuls`: what is served, cuBLAS, and each kernel of ours in many cuts."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax

from benchmarks.quantized_products import BF16, SHAPES, UNEVEN, UNROUNDED, Case
from jaxserve.pallas_kernels.gpu import Gpu
from jaxserve.pallas_kernels.matmul import add_parts, gated_matmul, matmul, multiply_gated
from jaxserve.pallas_kernels.matmul.mosaic_wide import WideMatmulConfig, matmul_wide
from jaxserve.pallas_kernels.quantized_matmul.activations import round_rows
from jaxserve.pallas_kernels.quantized_matmul.api import quantized_gated_matmul, quantized_matmul
from jaxserve.pallas_kernels.quantized_matmul.dispatch import triton_config
from jaxserve.pallas_kernels.quantized_matmul.many_tokens import eight_bit_matmul, widened
from jaxserve.pallas_kernels.quantized_matmul.mosaic import MosaicQuantizedConfig, quantized_matmul_mosaic
from jaxserve.pallas_kernels.quantized_matmul.mosaic_eight_bit import MosaicEightBitConfig, eight_bit_matmul_mosaic
from jaxserve.pallas_kernels.quantized_matmul.mosaic_wide import WideQuantizedConfig, quantized_matmul_wide
from jaxserve.pallas_kernels.quantized_matmul.triton import TritonQuantizedConfig, quantized_matmul_triton
from jaxserve.pallas_kernels.quantized_matmul.weights import EightBitWeight, FourBitWeight


@dataclass(frozen=True)
class Contender:
    """One way to compute a case."""

    case: Case
    name: str
    multiply: Callable[[jax.Array, Any], jax.Array]


def multiply_quantized(x: jax.Array, weight: FourBitWeight | EightBitWeight) -> jax.Array:
    """x [T, K], weight [N, K] -> [T, N], as it is served."""
    return quantized_matmul(x, weight, BF16)


def multiply_bf16(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [T, K], weight [N, K] -> [T, N]."""
    return jax.lax.dot_general(x, weight, (((1,), (1,)), ((), ())))


def multiply_rounded(x: jax.Array, weight: EightBitWeight) -> jax.Array:
    """x [T, K], weight [N, K] -> [T, N] by cuBLASLt's 8-bit products, with SwiGLU for gate and up rows."""
    product = eight_bit_matmul(*round_rows(x, weight.codes.dtype), weight, BF16)
    return multiply_gated(product) if weight.shape == SHAPES["swiglu"] else product


def multiply_widened(x: jax.Array, weight: FourBitWeight | EightBitWeight) -> jax.Array:
    """x [T, K], weight [N, K] -> [T, N] by the kernels for bfloat16, the weight written out, with SwiGLU for gate and up rows."""
    matrix = widened(weight, BF16)
    return gated_matmul(x, matrix) if weight.shape == SHAPES["swiglu"] else matmul(x, matrix, BF16)


def _served() -> Iterator[Contender]:
    """What `quantized_matmul` chooses, beside cuBLAS with bfloat16."""
    for shape in ("gate_up", "down", "qkv", "o", "head"):
        for tokens in (1, 16, 64, 256) if shape == "head" else (1, 16, 64, 256, 2048, 8192):
            yield Contender(Case("bf16", shape, tokens), "cublas", multiply_bf16)
            for kind in ("w4", "fp8"):
                yield Contender(Case(kind, shape, tokens), "served", multiply_quantized)
    for kind in ("w4z", "w4g32", "int8"):
        for tokens in (1, 16, 64):
            yield Contender(Case(kind, "gate_up", tokens), "served", multiply_quantized)


def triton(case: Case, *cut: int) -> Contender:
    """The Triton kernel: rows and tokens of a tile, blocks a step, splits, warps, stages."""
    config = TritonQuantizedConfig(*cut)

    def multiply(x: jax.Array, weight: FourBitWeight | EightBitWeight) -> jax.Array:
        parts = quantized_matmul_triton(x, weight, BF16, config=config)
        return parts[0] if config.splits == 1 else add_parts(parts, BF16)

    return Contender(case, f"triton {cut}", multiply)


def _triton_cuts() -> Iterator[Contender]:
    for tokens in (1, 16):
        for cut in ((64, 16, 2, 1, 2, 3), (64, 16, 1, 2, 2, 4), (64, 16, 1, 1, 2, 4), (128, 16, 1, 2, 4, 4)):
            yield triton(Case("w4", "gate_up", tokens), *cut)
        for cut in ((64, 16, 1, 1, 2, 4), (32, 16, 1, 1, 2, 4), (64, 16, 1, 2, 2, 3)):
            yield triton(Case("fp8", "gate_up", tokens), *cut)
        for kind in ("w4", "fp8"):
            for shape, splits in (("down", 8), ("qkv", 4), ("o", 8)):
                yield triton(Case(kind, shape, tokens), 64, 16, 1, splits, 2, 4)
    for cut in ((256, 64, 1, 1, 8, 3), (128, 64, 1, 1, 8, 4)):
        yield triton(Case("w4", "gate_up", 64), *cut)
    for shape, splits in (("down", 8), ("qkv", 4), ("o", 4)):
        yield triton(Case("w4", shape, 64), 128, 64, 1, splits, 8, 4)


def mosaic(case: Case, *cut: int) -> Contender:
    """The Mosaic kernel: warpgroups, splits, stages, blocks of threads."""
    config = MosaicQuantizedConfig(*cut)

    def multiply(x: jax.Array, weight: FourBitWeight) -> jax.Array:
        parts = quantized_matmul_mosaic(x, weight, config=config, gated=case.shape == "swiglu")
        return parts[0] if config.splits == 1 else add_parts(parts, BF16)

    return Contender(case, f"mosaic {cut}", multiply)


def _mosaic_cuts() -> Iterator[Contender]:
    for tokens in (1, 16):
        for cut in ((4, 1, 8, 132), (2, 1, 8, 264), (4, 1, 5, 132), (2, 1, 16, 132), (4, 2, 8, 132)):
            yield mosaic(Case("w4", "gate_up", tokens), *cut)
    for cut in ((2, 1, 8, 132), (4, 1, 5, 132), (2, 1, 4, 264), (1, 1, 5, 264)):
        yield mosaic(Case("w4", "gate_up", 64), *cut)
    for tokens, cuts in (
        (1, ((4, 1, 5, 132), (2, 1, 5, 132))),
        (16, ((4, 1, 5, 132), (2, 1, 4, 264))),
        (64, ((4, 1, 3, 132), (2, 1, 5, 132))),
    ):
        for cut in cuts:
            yield mosaic(Case("fp8", "gate_up", tokens), *cut)
    for kind, deep in (("w4", 8), ("fp8", 5)):
        for tokens in (1, 16, 64):
            stages = deep if tokens < 64 else 3
            yield mosaic(Case(kind, "down", tokens), 2, 4, stages, 132)
            yield mosaic(Case(kind, "qkv", tokens), 3, 4, stages, 132)
            yield mosaic(Case(kind, "o", tokens), 2, 4, stages, 132)
            yield mosaic(Case(kind, "head", tokens), 4, 1, stages if kind == "w4" or tokens == 64 else 5, 132)
        yield mosaic(Case(kind, "down", 16), 4, 8, 5, 132)
        yield mosaic(Case(kind, "qkv", 16), 2, 2, 5, 132)
        yield mosaic(Case(kind, "qkv", 16), 4, 4, 4, 132)
        yield mosaic(Case(kind, "o", 16), 4, 8, 4, 132)
        yield mosaic(Case(kind, "o", 16), 1, 2, 8, 132)
    yield mosaic(Case("w4z", "gate_up", 16), 4, 1, 8, 132)
    yield mosaic(Case("w4g32", "gate_up", 16), 4, 1, 8, 132)
    yield mosaic(Case("int8", "gate_up", 16), 4, 1, 5, 132)
    for tokens in (128, 256):
        yield mosaic(Case("w4", "gate_up", tokens), 2, 1, 4, 132)


def wide(case: Case, *cut: int) -> Contender:
    """The Mosaic kernel for many tokens: a WideQuantizedConfig without its number of blocks; an eighth number: with turns."""
    warpgroups, tokens, splits, stages, code_stages, cluster, panel = cut[:7]
    config = WideQuantizedConfig(warpgroups, tokens, splits, stages, code_stages, 132, cluster, panel, takes_turns=len(cut) > 7)

    def multiply(x: jax.Array, weight: FourBitWeight) -> jax.Array:
        parts = quantized_matmul_wide(x, weight, config=config, gated=case.shape == "swiglu")
        return parts[0] if config.splits == 1 else add_parts(parts, BF16)

    return Contender(case, f"mosaic wide {cut}", multiply)


def _wide_cuts() -> Iterator[Contender]:
    """Warpgroups, tokens, splits, stages of tokens and of codes, cluster, panel, turns."""
    whole, halves = (2, 256, 1, 5, 3, 2, 4), (2, 128, 1, 8, 4, 2, 4)
    cuts = {
        ("swiglu", 160): ((2, 160, 1, 7, 4, 2, 4), (2, 160, 1, 7, 4, 2, 4, 1)),
        ("swiglu", 256): (whole, (*whole, 1)),
        ("swiglu", 2048): (whole, (*whole, 1)),
        ("swiglu", 8192): (whole, (*whole, 1)),
        ("gate_up", 256): (whole, (*whole, 1), (2, 256, 1, 5, 3, 1, 4, 1)),
        ("gate_up", 2048): (whole, (*whole, 1)),
        ("gate_up", 8192): (whole, (*whole, 1)),
        ("down", 256): ((2, 256, 4, 5, 3, 2, 4), (2, 256, 4, 5, 3, 2, 4, 1), (2, 128, 2, 8, 4, 2, 4, 1)),
        ("down", 2048): (whole, (*whole, 1)),
        ("down", 8192): (whole, (*whole, 1)),
        ("qkv", 256): (halves, (*halves, 1), (2, 256, 2, 5, 3, 2, 4, 1)),
        ("qkv", 2048): (whole, (*whole, 1)),
        ("o", 256): ((2, 128, 2, 8, 4, 2, 4), (2, 128, 2, 8, 4, 2, 4, 1), (2, 256, 4, 5, 3, 2, 4, 1)),
        ("o", 2048): (whole, (*whole, 1)),
    }
    for (shape, tokens), of_case in cuts.items():
        multiply = functools.partial(matmul, out_dtype=BF16) if shape != "swiglu" else gated_matmul
        yield Contender(Case("bf16", shape, tokens), "bf16 served", multiply)
        for cut in of_case:
            yield wide(Case("w4", shape, tokens), *cut)
    yield wide(Case("w4z", "gate_up", 256), *whole)
    yield wide(Case("w4g32", "gate_up", 256), *whole)


def multiply_triton(x: jax.Array, weight: FourBitWeight) -> jax.Array:
    """x [T, K], weight [N, K] -> [T, N] by the Triton kernel as it is cut for up to 256 tokens, with SwiGLU for gate and up rows."""
    config = triton_config(x, weight, Gpu(132, True))
    assert config is not None
    product = add_parts(quantized_matmul_triton(x, weight, BF16, config=config), BF16)
    return multiply_gated(product) if weight.shape == SHAPES["swiglu"] else product


def _unrounded() -> Iterator[Contender]:
    """8 bits times activations that are not rounded: what is served, what was before, and bfloat16; whole cuts beside what is chosen."""
    for shape in ("swiglu", "down", "qkv", "o"):
        gated = shape == "swiglu"
        for tokens in (160, 256, 2048, 8192):
            bf16 = gated_matmul if gated else functools.partial(matmul, out_dtype=BF16)
            yield Contender(Case("bf16", shape, tokens), "bf16 served", bf16)
            for kind in UNROUNDED:
                case = Case(kind, shape, tokens)
                yield Contender(case, "served", quantized_gated_matmul if gated else multiply_quantized)
                yield Contender(case, "widened", multiply_widened)
                if tokens > 256:
                    yield wide(case, 2, 256, 1, 4, 2, 2, 4)
                    yield wide(case, 2, 256, 1, 4, 3, 1, 4)


def _uneven() -> Iterator[Contender]:
    """4 bits with a table or minima: what is served, with a weight that is written out or by Triton; plain codes, and bfloat16."""
    for shape in ("swiglu", "gate_up", "down", "qkv", "o"):
        gated = shape == "swiglu"
        multiply = quantized_gated_matmul if gated else multiply_quantized
        for tokens in (64, 128, 160, 256, 2048, 8192):
            bf16 = gated_matmul if gated else functools.partial(matmul, out_dtype=BF16)
            yield Contender(Case("bf16", shape, tokens), "bf16 served", bf16)
            yield Contender(Case("w4", shape, tokens), "mosaic served", multiply)
            for kind in UNEVEN:
                case = Case(kind, shape, tokens)
                yield Contender(case, "mosaic served", multiply)
                if tokens <= 256 and not kind.startswith("q4"):
                    yield Contender(case, "triton", multiply_triton)
                else:
                    yield Contender(case, "widened", multiply_widened)


def eight_bit(case: Case, *cut: int) -> Contender:
    """The Mosaic kernel for 8 bits and a scale a row: warpgroups, splits, columns, stages, blocks of threads."""
    config = MosaicEightBitConfig(*cut)

    def multiply(x: jax.Array, weight: EightBitWeight) -> jax.Array:
        parts = eight_bit_matmul_mosaic(x, weight, config=config, gated=case.shape == "swiglu")
        return parts[0] if config.splits == 1 else add_parts(parts, BF16)

    return Contender(case, f"mosaic8 {cut}", multiply)


def _few_cuts() -> Iterator[Contender]:
    """Few tokens times weights of 8 bits by Mosaic's kernel for them, by the one for groups, and by what is served."""
    few = {
        "swiglu": ((2, 1, 256, 3, 132), (1, 1, 256, 5, 132), (2, 1, 128, 6, 132)),
        "down": ((2, 4, 256, 5, 132),),
        "qkv": ((3, 4, 256, 4, 132), (2, 2, 256, 5, 132), (1, 1, 256, 8, 132)),
        "o": ((2, 4, 256, 5, 132),),
    }
    some = {
        "swiglu": ((2, 1, 128, 4, 132), (1, 1, 128, 6, 132), (1, 1, 256, 3, 132)),
        "down": ((2, 4, 128, 6, 132), (2, 4, 256, 3, 132)),
        "qkv": ((2, 2, 128, 6, 132), (1, 1, 128, 8, 132), (3, 4, 128, 4, 132)),
        "o": ((2, 4, 128, 6, 132), (1, 2, 128, 6, 132)),
    }
    for tokens, cuts in ((8, few), (64, some)):
        for shape, of_shape in cuts.items():
            case = Case("fp8", shape, tokens)
            for cut in of_shape:
                yield eight_bit(case, *cut)
            if tokens > 8:
                yield Contender(case, "8-bit products", multiply_rounded)
    for kind in ("fp8", "w4"):
        yield triton(Case(kind, "gate_up", 8), 64, 16, 1, 1, 2, 4)
        yield triton(Case(kind, "qkv", 8), 64, 16, 1, 4, 2, 4)
    yield mosaic(Case("w4", "gate_up", 8), 4, 1, 8, 132)
    for tokens in (16, 64):
        yield Contender(Case("w4", "swiglu", tokens), "SwiGLU apart", lambda x, weight: multiply_gated(quantized_matmul(x, weight, BF16)))
        yield Contender(Case("w4", "swiglu", tokens), "mosaic served", quantized_gated_matmul)
    yield mosaic(Case("w4", "swiglu", 8), 4, 1, 8, 132)


def wide8(case: Case, *cut: int) -> Contender:
    """The Mosaic kernel for many tokens and gated products in 8 bits, after a rounding kernel: a WideMatmulConfig."""
    config = WideMatmulConfig(*cut)

    def multiply(x: jax.Array, weight: EightBitWeight) -> jax.Array:
        codes, scales = round_rows(x, weight.codes.dtype)
        return matmul_wide(codes, weight.codes, (scales[:, 0], weight.scales[0]), config=config, gated=True)[0]

    return Contender(case, f"mosaic wide8 {cut}", multiply)


def _rounded_cuts() -> Iterator[Contender]:
    """float8 gated products of one step of decodes, by cuBLASLt and by our kernel for prompts."""
    by_rows, by_tokens = (2, 128, 112, 1, 4, 132, 2), (2, 64, 256, 1, 4, 132, 1, 2)
    cuts = {
        256: (by_rows, by_rows[:6], (2, 128, 128, 1, 4, 132, 2), (2, 64, 224, 1, 4, 132, 1, 2), by_tokens),
        512: (by_rows, by_tokens),
    }
    for tokens, of_tokens in cuts.items():
        case = Case("fp8", "swiglu", tokens)
        yield Contender(case, "8-bit products", multiply_rounded)
        for cut in of_tokens:
            yield wide8(case, *cut)


CONTENDERS = {
    "served": _served,
    "triton": _triton_cuts,
    "mosaic": _mosaic_cuts,
    "wide": _wide_cuts,
    "unrounded": _unrounded,
    "uneven": _uneven,
    "few": _few_cuts,
    "rounded": _rounded_cuts,
}
