"""Speed of products with weights of 4 and 8 bits on this GPU: `python -m benchmarks.quantized_matmuls [--contenders wide]`.

A figure is the time of one of many products in one jit, one after the other, each with tokens of its own and weights that are together
five times what the L2 cache holds. It is the difference of two runs' times, of few and of many calls of the jit: so a product's launch is
in it, but not the host's time for the first call and the wait for the last. Outputs are compared with float32 on 256 random rows of the
weight. The last table has the best cut of each case beside the floor, which is the weight's bytes at 4.5 TB/s or the products at the
tensor cores' rate, whichever is longer.
"""

import argparse
import json
import os
import statistics
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.quantized_contenders import CONTENDERS, Contender
from benchmarks.quantized_products import BF16, SHAPES, Case, make_weight, weight_bytes
from benchmarks.rows import add_row_flags, command_line, make_rows
from jaxserve.pallas_kernels.matmul import multiply_gated

# cuBLAS alone beside ours; and products that need nothing of each other one after the other, as a model's are.
COMPILER_OPTIONS = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_command_buffer_scheduling_mode": "SERIALIZE"}
LAUNCH_SECONDS = 6e-6  # of a kernel, with its first fetch and its end
CALLS = 4, 12  # of the jit, without and with what a figure is of


def weights_in_a_jit(case: Case) -> int:
    """Weights of 250 MB together."""
    return max(2, min(48, -(-250_000_000 // weight_bytes(case.kind, case.shape))))


def products_in_a_jit(case: Case) -> int:
    """Enough that a call lasts 800 us, longer than its dispatch: a product with each weight, several times."""
    weights = weights_in_a_jit(case)
    seconds = case.floor(weight_bytes(case.kind, case.shape)) + LAUNCH_SECONDS
    return weights * max(1, round(8e-4 / seconds / weights))


def compile_products(contender: Contender) -> Any:
    """The jit that computes a contender's products; an exception where it does not compile."""
    case = contender.case
    count, weights = products_in_a_jit(case), weights_in_a_jit(case)
    product = jax.jit(contender.multiply)

    def chain(xs: list[jax.Array], ws: list[Any]) -> list[jax.Array]:
        return [product(x, ws[i % len(ws)]) for i, x in enumerate(xs)]

    tokens = jax.ShapeDtypeStruct((case.tokens, SHAPES[case.shape][1]), BF16)
    weight = jax.eval_shape(lambda: make_weight(jnp.int32(0), case.kind, *SHAPES[case.shape]))
    try:
        lowered = jax.jit(chain).lower([tokens] * count, [weight] * weights)
        return lowered.compile(compiler_options=COMPILER_OPTIONS)
    except Exception as error:  # one cut that does not compile must not end the others
        return error


def measure(compiled: Any, xs: list[jax.Array], weights: list[Any], expected: np.ndarray, rows: np.ndarray) -> tuple[float, float]:
    """Median seconds of a product, and the relative L2 error of the first."""
    outputs = compiled(xs, weights)
    got = np.asarray(outputs[0][sample_tokens(len(outputs[0]))[:, None], rows], np.float32)
    error = float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
    jax.block_until_ready(compiled(xs, weights))  # the second run records the graph

    def run(calls: int) -> float:
        started = time.perf_counter()
        jax.block_until_ready([compiled(xs, weights)[0] for _ in range(calls)])
        return time.perf_counter() - started

    few, many = CALLS
    times = [(run(many) - run(few)) / (many - few) / len(xs) for _ in range(5)]
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
        while len(weights) < weights_in_a_jit(case):
            weights.append(make_weight(jnp.int32(seed + len(weights)), case.kind, size, depth))
        xs = [jax.random.normal(jax.random.key(seed + 1000 + n), (case.tokens, depth), BF16) for n in range(count)]
        is_gated = case.shape == "swiglu"
        columns = np.random.default_rng(seed).integers(0, size // (2 if is_gated else 1), 256)
        rows = np.concatenate([columns, columns + size // 2]) if is_gated else columns
        matrix = weights[0][rows] if case.kind == "bf16" else weights[0].rows(jnp.asarray(rows), jnp.float32)
        expected = np.asarray(xs[0][sample_tokens(case.tokens)], np.float32) @ np.asarray(matrix, np.float32).T
        expected = np.asarray(multiply_gated(jnp.asarray(expected))) if is_gated else expected
        print(f"{running}", end="\r", file=sys.stderr, flush=True)  # the last of these is what hung
        seconds, error = measure(compiled, xs, weights[: weights_in_a_jit(case)], expected, columns)
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
