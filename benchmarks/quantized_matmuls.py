"""Speed of products with weights of 4 and 8 bits on this GPU: `python -m benchmarks.quantized_matmuls [--contenders wide]`.

A figure is the time of one of many products in one jit, one after the other, each with tokens and a weight of its own (together more than
the L2 cache holds). Outputs are compared with float32 on 256 random rows of the weight. The last table has the best cut of each case beside
the floor, which is the weight's bytes at 4.5 TB/s or the products at the tensor cores' rate, whichever is longer.
"""

import argparse
import functools
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.rows import add_row_flags, command_line, make_rows
from jaxserve.pallas_kernels.matmul import add_parts, gated_matmul, matmul, multiply_gated
from jaxserve.pallas_kernels.matmul.mosaic_wide import WideMatmulConfig, matmul_wide
from jaxserve.pallas_kernels.quantized_matmul.activations import round_rows
from jaxserve.pallas_kernels.quantized_matmul.api import quantized_gated_matmul, quantized_matmul
from jaxserve.pallas_kernels.quantized_matmul.many_tokens import eight_bit_matmul
from jaxserve.pallas_kernels.quantized_matmul.mosaic import MosaicQuantizedConfig, quantized_matmul_mosaic
from jaxserve.pallas_kernels.quantized_matmul.mosaic_eight_bit import MosaicEightBitConfig, eight_bit_matmul_mosaic
from jaxserve.pallas_kernels.quantized_matmul.mosaic_wide import WideQuantizedConfig, quantized_matmul_wide
from jaxserve.pallas_kernels.quantized_matmul.triton import TritonQuantizedConfig, quantized_matmul_triton
from jaxserve.pallas_kernels.quantized_matmul.weights import EightBitWeight, FourBitWeight

BF16 = jnp.bfloat16
READ_FLOOR_TBPS = 4.5  # measured on an H200: a sum over an array
TENSOR_TFLOPS = {"bf16": 815, "w4": 815, "w4z": 815, "w4g32": 815, "fp8": 1630, "int8": 1630}
SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336), "head": (128256, 4096)}  # [N, K]
SHAPES["swiglu"] = SHAPES["gate_up"]  # with silu(gate) * up
CUBLAS_ALONE = {"xla_gpu_enable_triton_gemm": False}


@dataclass(frozen=True)
class Case:
    """Tokens times a weight of a kind and shape."""

    kind: str
    shape: str
    tokens: int

    def floor(self, weight_bytes: int) -> float:
        """Seconds below which no kernel can be."""
        size, depth = SHAPES[self.shape]
        return max(weight_bytes / READ_FLOOR_TBPS / 1e12, 2 * self.tokens * size * depth / TENSOR_TFLOPS[self.kind] / 1e12)


@dataclass(frozen=True)
class Contender:
    """One way to compute a case."""

    case: Case
    name: str
    multiply: Callable[[jax.Array, Any], jax.Array]


def triton(case: Case, *cut: int) -> Contender:
    """The Triton kernel: rows and tokens of a tile, blocks a step, splits, warps, stages."""
    config = TritonQuantizedConfig(*cut)

    def multiply(x: jax.Array, weight: FourBitWeight | EightBitWeight) -> jax.Array:
        parts = quantized_matmul_triton(x, weight, BF16, config=config)
        return parts[0] if config.splits == 1 else add_parts(parts, BF16)

    return Contender(case, f"triton {cut}", multiply)


def mosaic(case: Case, *cut: int) -> Contender:
    """The Mosaic kernel: warpgroups, splits, stages, blocks of threads."""
    config = MosaicQuantizedConfig(*cut)

    def multiply(x: jax.Array, weight: FourBitWeight) -> jax.Array:
        parts = quantized_matmul_mosaic(x, weight, config=config, gated=case.shape == "swiglu")
        return parts[0] if config.splits == 1 else add_parts(parts, BF16)

    return Contender(case, f"mosaic {cut}", multiply)


def wide(case: Case, *cut: int) -> Contender:
    """The Mosaic kernel for many tokens: a WideQuantizedConfig without its number of blocks; an eighth number: with turns."""
    warpgroups, tokens, splits, stages, code_stages, cluster, panel = cut[:7]
    config = WideQuantizedConfig(warpgroups, tokens, splits, stages, code_stages, 132, cluster, panel, takes_turns=len(cut) > 7)

    def multiply(x: jax.Array, weight: FourBitWeight) -> jax.Array:
        parts = quantized_matmul_wide(x, weight, config=config, gated=case.shape == "swiglu")
        return parts[0] if config.splits == 1 else add_parts(parts, BF16)

    return Contender(case, f"mosaic wide {cut}", multiply)


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


def eight_bit(case: Case, *cut: int) -> Contender:
    """The Mosaic kernel for 8 bits and a scale a row: warpgroups, splits, columns, stages, blocks of threads."""
    config = MosaicEightBitConfig(*cut)

    def multiply(x: jax.Array, weight: EightBitWeight) -> jax.Array:
        parts = eight_bit_matmul_mosaic(x, weight, config=config, gated=case.shape == "swiglu")
        return parts[0] if config.splits == 1 else add_parts(parts, BF16)

    return Contender(case, f"mosaic8 {cut}", multiply)


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


def multiply_rounded(x: jax.Array, weight: EightBitWeight) -> jax.Array:
    """x [T, K], weight [N, K] -> [T, N] by cuBLASLt's 8-bit products, with SwiGLU for gate and up rows."""
    product = eight_bit_matmul(*round_rows(x, weight.codes.dtype), weight, BF16)
    return multiply_gated(product) if weight.shape == SHAPES["swiglu"] else product


CONTENDERS = {
    "rounded": _rounded_cuts,
    "few": _few_cuts,
    "served": _served,
    "mosaic": _mosaic_cuts,
    "wide": _wide_cuts,
    "triton": _triton_cuts,
}


def multiply_quantized(x: jax.Array, weight: FourBitWeight | EightBitWeight) -> jax.Array:
    """x [T, K], weight [N, K] -> [T, N], as it is served."""
    return quantized_matmul(x, weight, BF16)


def multiply_bf16(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [T, K], weight [N, K] -> [T, N]."""
    return jax.lax.dot_general(x, weight, (((1,), (1,)), ((), ())))


@functools.partial(jax.jit, static_argnames=("kind", "size", "depth"))
def make_weight(seed: jax.Array, kind: str, size: int, depth: int) -> Any:
    """A random weight [N, K] of a kind."""
    keys = jax.random.split(jax.random.key(seed), 3)

    def scales(groups: int, dtype: Any) -> jax.Array:
        return (jax.random.uniform(keys[0], (groups, size), jnp.float32, 0.5, 1.5) * 0.01).astype(dtype)

    if kind.startswith("w4"):
        groups = depth // (32 if kind == "w4g32" else 128)
        zeros = jax.random.randint(keys[1], (groups, size), 0, 16, jnp.int32).astype(jnp.uint8) if kind == "w4z" else None
        return FourBitWeight(jax.random.bits(keys[2], (depth // 128, size, 32), jnp.uint16), scales(groups, jnp.float16), zeros)
    if kind == "bf16":
        return jax.random.normal(keys[2], (size, depth), BF16)
    if kind == "int8":
        codes = jax.lax.bitcast_convert_type(jax.random.bits(keys[2], (size, depth), jnp.uint8), jnp.int8)
    else:
        codes = jax.random.normal(keys[2], (size, depth), BF16).astype(jnp.float8_e4m3fn)
    return EightBitWeight(codes, scales(1, jnp.float32), quantized_activations=True)


def weight_bytes(kind: str, shape: str) -> int:
    """Bytes of a weight of a kind, with its scales."""
    abstract = jax.eval_shape(lambda: make_weight(jnp.int32(0), kind, *SHAPES[shape]))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))


def products_in_a_jit(case: Case) -> int:
    """Enough that a dispatch lasts 400 us and the weights are 250 MB."""
    size = weight_bytes(case.kind, case.shape)
    return max(2, min(48, max(-(-250_000_000 // size), int(4e-4 / case.floor(size)))))


def compile_products(contender: Contender) -> Any:
    """The jit that computes a contender's products; an exception where it does not compile."""
    case = contender.case
    count = products_in_a_jit(case)
    product = jax.jit(contender.multiply)
    tokens = jax.ShapeDtypeStruct((case.tokens, SHAPES[case.shape][1]), BF16)
    weight = jax.eval_shape(lambda: make_weight(jnp.int32(0), case.kind, *SHAPES[case.shape]))
    try:
        lowered = jax.jit(lambda xs, ws: [product(x, w) for x, w in zip(xs, ws, strict=True)]).lower([tokens] * count, [weight] * count)
        return lowered.compile(compiler_options=CUBLAS_ALONE)
    except Exception as error:  # one cut that does not compile must not end the others
        return error


def measure(compiled: Any, xs: list[jax.Array], weights: list[Any], expected: np.ndarray, rows: np.ndarray) -> tuple[float, float]:
    """Median seconds of a product, and the relative L2 error of the first."""
    outputs = compiled(xs, weights)
    got = np.asarray(outputs[0][sample_tokens(len(outputs[0]))[:, None], rows], np.float32)
    error = float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
    jax.block_until_ready(compiled(xs, weights))  # the second run records the graph
    times = []
    for _ in range(5):
        started = time.perf_counter()
        jax.block_until_ready([compiled(xs, weights)[0] for _ in range(4)])
        times.append((time.perf_counter() - started) / 4 / len(xs))
    return statistics.median(times), error


def sample_tokens(num_tokens: int) -> np.ndarray:
    """Up to 64 tokens whose outputs are compared, from first to last."""
    return np.unique(np.linspace(0, num_tokens - 1, 64).astype(int))


def main() -> None:
    """Compile everything in threads, measure one after the other, print a table."""
    parser = argparse.ArgumentParser(description="Speed of products with quantized weights on this GPU.")
    parser.add_argument("--seconds", type=float, default=100, help="stop measuring after so long")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=["served"], help="what is served, or cuts of a kernel")
    parser.add_argument("--only", nargs="+", default=[], help="cases whose 'kind shape tokens' begin with one of these")
    parser.add_argument("--threads", type=int, default=16, help="that compile")
    parser.add_argument("--json", type=Path, help="write every figure here")
    add_row_flags(parser)
    arguments = parser.parse_args()
    started = time.perf_counter()
    # Products that do not depend on each other would run side by side.
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_command_buffer_scheduling_mode=SERIALIZE"
    if jax.default_backend() != "gpu":
        sys.exit("no GPU")
    wanted = [contender for name in arguments.contenders for contender in CONTENDERS[name]()]
    wanted = [c for c in wanted if not arguments.only or f"{c.case.kind} {c.case.shape} {c.case.tokens}".startswith(tuple(arguments.only))]
    with ThreadPoolExecutor(arguments.threads) as pool:
        futures = [pool.submit(compile_products, contender) for contender in wanted]
        deadline = started + 0.72 * arguments.seconds
        for future in futures:
            try:
                future.exception(timeout=max(0.0, deadline - time.perf_counter()))
            except TimeoutError:
                future.cancel()
        print(
            f"{sum(f.done() and not f.cancelled() for f in futures)} of {len(wanted)} compiled at {time.perf_counter() - started:.0f} s",
            flush=True,
        )
        figures: list[dict[str, Any]] = []

        def end() -> None:
            if arguments.json:
                arguments.json.write_text(json.dumps(figures, indent=1))
            print_table(list(figures))
            rows = make_rows(arguments, jax.local_devices()[0].device_kind)
            for figure in figures:
                if figure["name"] == "served":
                    rows.add(row_name(figure), figure["us"], "us", command_line("benchmarks.quantized_matmuls"))
            sys.stdout.flush()
            os._exit(1 if any(figure["wrong"] for figure in figures) else 0)  # not waiting for what still compiles or hangs

        watchdog = threading.Timer(started + arguments.seconds + 8 - time.perf_counter(), end)
        watchdog.daemon = True
        watchdog.start()
        measure_all(wanted, futures, started + arguments.seconds, figures)
        end()


def row_name(figure: dict[str, Any]) -> str:
    """`w4a16_m16_us` for gate and up rows of 4 bits, `fp8_down_m16_us` for others."""
    kind, shape, tokens = (figure[key] for key in ("kind", "shape", "tokens"))
    return f"w4a16_m{tokens}_us" if (kind, shape) == ("w4", "gate_up") else f"{kind}_{shape}_m{tokens}_us"


def measure_all(wanted: list[Contender], futures: list[Any], deadline: float, figures: list[dict[str, Any]]) -> None:
    """Append a row a contender that compiled to figures; weights are made once for each kind and shape."""
    seed = time.time_ns() % 2**30
    weights: list[Any] = []
    made_for: tuple[str, str] | None = None
    # A kernel that hangs must not keep the older ones from being measured.
    order = sorted(range(len(wanted)), key=lambda i: (wanted[i].name.startswith("mosaic"), str(wanted[i].case)))
    for i in order:
        case, future = wanted[i].case, futures[i]
        running = f"{case.kind} {case.shape} T={case.tokens} {wanted[i].name}"
        if time.perf_counter() > deadline:
            print("out of time", flush=True)
            break
        if future.cancelled() or not future.done():
            continue
        compiled = future.result()
        if isinstance(compiled, Exception):
            reason = f"{type(compiled).__name__} {' '.join(str(compiled).split())[:160]}"
            print(f"{running}: {reason}")
            continue
        count = products_in_a_jit(case)
        size, depth = SHAPES[case.shape]
        if made_for != (case.kind, case.shape):
            weights.clear()
            made_for = case.kind, case.shape
        while len(weights) < count:
            weights.append(make_weight(jnp.int32(seed + len(weights)), case.kind, size, depth))
        xs = [jax.random.normal(jax.random.key(seed + 1000 + n), (case.tokens, depth), BF16) for n in range(count)]
        is_gated = case.shape == "swiglu"
        columns = np.random.default_rng(seed).integers(0, size // (2 if is_gated else 1), 256)
        rows = np.concatenate([columns, columns + size // 2]) if is_gated else columns
        matrix = weights[0][rows] if case.kind == "bf16" else weights[0].rows(jnp.asarray(rows), jnp.float32)
        expected = np.asarray(xs[0][sample_tokens(case.tokens)], np.float32) @ np.asarray(matrix, np.float32).T
        expected = np.asarray(multiply_gated(jnp.asarray(expected))) if is_gated else expected
        print(f"{running}", end="\r", file=sys.stderr, flush=True)  # the last of these is what hung
        seconds, error = measure(compiled, xs, weights[:count], expected, columns)
        # Activations may be rounded to 8 bits.
        rounds = wanted[i].name in ("served", "8-bit products") or "wide8" in wanted[i].name
        bound = {"fp8": 0.04, "int8": 0.02}.get(case.kind, 4e-3) if rounds else 4e-3
        bound = max(bound, 6e-3) if is_gated else bound  # gate and up are rounded first
        floor = case.floor(weight_bytes(case.kind, case.shape))
        row = dict(kind=case.kind, shape=case.shape, tokens=case.tokens, name=wanted[i].name, us=seconds * 1e6, floor_us=floor * 1e6)
        figures.append(row | dict(error=error, wrong=not error < bound))


def print_table(figures: list[dict[str, Any]]) -> None:
    """The four best of each case."""
    cases: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for figure in figures:
        cases.setdefault((figure["kind"], figure["shape"], figure["tokens"]), []).append(figure)
    for (kind, shape, tokens), rows in cases.items():
        rows.sort(key=lambda row: row["us"])
        best = "  ".join(f"{row['us']:.1f} {row['name'].replace('triton ', '')}" for row in rows[:4])
        wrong = "".join(f"  WRONG {row['error']:.1e} {row['name']}" for row in rows if row["wrong"])
        line = f"{kind:5s} {shape:8s} T={tokens:<5d} floor {rows[0]['floor_us']:6.1f}  {best}"
        print(f"{line}  worst {rows[-1]['us']:.1f}  error {rows[0]['error']:.1e}{wrong}")


if __name__ == "__main__":
    main()
