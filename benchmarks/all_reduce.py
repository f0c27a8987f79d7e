"""Sums over the GPUs of one process: microseconds by size, the kernel over peer memory against XLA's psum; the bits are checked first.

    NCCL_NVLS_ENABLE=0 python -m benchmarks.all_reduce [--results FILE] [--sizes KIB ...] [--seconds 60]
    python -m benchmarks.all_reduce --one-gpu          # only whether sums are right, of 2, 4 and 8 shards on one GPU

A figure is the time of a jitted program of LINKS sums, each behind a small product that needs the sum before, less that of the same
program without sums, over LINKS. So it has what a program loses where a sum splits its CUDA graph. Rows are bfloat16 of 4096 numbers.
`norm` has the residual addition and norm that follow: in the kernel, and as psum and kernel. On the CPU (fake devices) psum alone runs.
"""

import argparse
import functools
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.rows import Rows, add_row_flags, command_line, make_rows
from jaxserve.pallas_kernels import ExchangeLayout, Shards, all_reduce, all_reduce_add_rms_norm, peers_table
from jaxserve.pallas_kernels.add_rms_norm import add_rms_norm
from jaxserve.pallas_kernels.add_rms_norm.reference import add_rms_norm_reference
from jaxserve.pallas_kernels.all_reduce import api, triton
from jaxserve.runner import make_mesh
from jaxserve.runner.exchange import Exchange, reach_each_other

LINKS = 32
RUNS = 20
COLUMNS = 4096
SIZES = (8, 64, 256, 512, 1024, 2048, 4096, 8192, 16384)  # KiB
EPS = 1e-5
SMALL = 256  # rows and columns of the product between two sums
BF16 = jnp.dtype(jnp.bfloat16)

# Of x [T, COLUMNS], a residual and a weight: the sum, and the residual after it.
Reduction = Callable[[jax.Array, jax.Array, jax.Array, Shards], tuple[jax.Array, jax.Array]]


def _xla(shards: Shards) -> Shards:
    return Shards(None, shards.axis)


# What is timed; those with a norm are for few rows.
FORMS: dict[str, Reduction] = {
    "none": lambda x, residual, weight, shards: (x, residual),
    "psum": lambda x, residual, weight, shards: (all_reduce(x, x.dtype, _xla(shards)), residual),
    "kernel": lambda x, residual, weight, shards: (all_reduce(x, x.dtype, shards), residual),
    "norm_psum": lambda x, residual, weight, shards: all_reduce_add_rms_norm(x, residual, weight, EPS, _xla(shards)),
    "norm_apart": lambda x, residual, weight, shards: add_rms_norm(all_reduce(x, x.dtype, shards), residual, weight, EPS),
    "norm_kernel": lambda x, residual, weight, shards: all_reduce_add_rms_norm(x, residual, weight, EPS, shards),
}


def program(mesh: Mesh, form: str, links: int) -> Any:
    """Jitted: (x [shards, T, COLUMNS], residual, weight, small, table) -> the last sum on each shard, and the residual."""
    once = jax.jit(FORMS[form])

    def chain(
        x: jax.Array, residual: jax.Array, weight: jax.Array, small: jax.Array, table: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        x, shards = x[0], Shards(table)
        for _ in range(links):
            y, residual = jax.lax.optimization_barrier(once(x, residual, weight, shards))
            if links > 1:  # half of it, so that nothing grows, and a product of a corner
                corner = jnp.dot(y[:SMALL, :SMALL], small)
                y = (y * jnp.asarray(0.5, y.dtype)).at[:SMALL, :SMALL].add(corner)
            x = y
        return x[None], residual[None]

    specs = P("tensor"), P(), P(), P(), P("tensor")
    mapped = jax.shard_map(chain, mesh=mesh, in_specs=specs, out_specs=P("tensor"), check_vma=False)
    return jax.jit(mapped, compiler_options={"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0} if on_gpu(mesh) else {})


def on_gpu(mesh: Mesh) -> bool:
    return mesh.devices.flat[0].platform == "gpu"


class Arguments:
    """Of programs of a size, the same for all of them."""

    def __init__(self, mesh: Mesh, kib: int, table: jax.Array | None):
        shards, self.num_rows = mesh.shape["tensor"], kib * 1024 // (2 * COLUMNS)
        random = np.random.default_rng(kib)
        whole = random.standard_normal((shards, self.num_rows, COLUMNS), np.float32).astype(BF16)
        # Zeros of both signs; bits that look like an empty place, in a row of many, as they make its norm not a number.
        whole[:, 0, :4] = np.array([0x8000, 0x8000, 0x8000, 0], np.uint16).view(BF16)
        if self.num_rows > 1:
            whole[0, -1, :2] = np.array([0xFFFF, 0xFFFF], np.uint16).view(BF16)
        self.whole = whole
        residual, weight = (random.standard_normal(shape, np.float32).astype(BF16) for shape in ((self.num_rows, COLUMNS), (COLUMNS,)))
        small = (random.standard_normal((SMALL, SMALL), np.float32) / 1024).astype(BF16)
        copied = NamedSharding(mesh, P())
        x = jax.make_array_from_callback(whole.shape, NamedSharding(mesh, P("tensor")), lambda index: whole[index])
        self.values = (x, *(jax.device_put(y, copied) for y in (residual, weight, small)), table)

    def check(self, form: str, compiled: Any) -> str | None:
        """Run a program of one link some times; what is wrong, or None. Many rounds go through the same places."""
        expected = self.whole[0].astype(np.float32)
        for part in self.whole[1:]:
            expected = expected + part.astype(np.float32)
        total = jnp.asarray(expected.astype(BF16))
        if "norm" in form:
            results = jax.jit(functools.partial(add_rms_norm_reference, eps=EPS))(total, *(np.asarray(y) for y in self.values[1:3]))
            expected = [np.asarray(result.astype(jnp.float32)) for result in results]
        else:
            expected = [np.asarray(total.astype(jnp.float32))]
        for run in range(5):
            got = [np.asarray(y).astype(np.float32) for y in compiled(*self.values)]
            for y, right in zip(got, expected, strict=False):
                if any(not np.array_equal(shard, y[0], equal_nan=True) for shard in y[1:]):
                    return f"run {run}: shards differ"
                # A norm's sums have an order of their own, and psum's.
                near = 0.0 if form == "kernel" else 2.0**-6
                wrong = ~np.isclose(y[0], right, rtol=near, atol=near, equal_nan=True)
                if wrong.any():
                    return f"run {run}: {wrong.sum()} numbers are wrong, first at {np.argwhere(wrong)[0]}"
        return None


def seconds(compiled: Any, values: tuple[Any, ...]) -> float:
    """Of a run, the best of three series."""
    jax.block_until_ready(compiled(*values))
    jax.block_until_ready(compiled(*values))
    best = float("inf")
    for _ in range(3):
        begin = time.perf_counter()
        jax.block_until_ready([compiled(*values) for _ in range(RUNS)])
        best = min(best, (time.perf_counter() - begin) / RUNS)
    return best


def watch(limit: float) -> None:
    """End the process some time after the limit, whatever hangs."""

    def end() -> None:
        print("benchmarks.all_reduce: out of time, something hangs", flush=True)
        os._exit(3)

    timer = threading.Timer(limit + 15, end)
    timer.daemon = True
    timer.start()


def measure(mesh: Mesh, sizes: list[int], rows: Rows, limit: float) -> bool:
    """Check and time all forms of all sizes, the small ones first; returns whether all sums were right."""
    begin, table, right = time.perf_counter(), None, True
    forms = [form for form in FORMS if "kernel" not in form and "apart" not in form]
    if reach_each_other(mesh):
        exchange = Exchange(mesh)
        table, forms = exchange.peers, list(FORMS)
        api.MOST_BYTES = dict.fromkeys(api.MOST_BYTES, 2**30)  # whatever the size, here a kernel adds up
    else:
        print("these devices do not reach each other's memory: psum alone", flush=True)
    arguments = {kib: Arguments(mesh, kib, table) for kib in sizes}
    wanted = [(kib, form) for kib in sizes for form in forms if "norm" not in form or arguments[kib].num_rows <= api.MOST_ROWS]
    # Traced one after the other, compiled in threads: so no time is lost between figures.
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        compiled = {
            (kib, form, links): threads.submit(program(mesh, form, links).lower(*arguments[kib].values).compile)
            for kib, form in wanted
            for links in (1, LINKS)
        }
        known: dict[tuple[int, str], float] = {}
        for kib, form in wanted:
            if time.perf_counter() - begin > limit:
                print("the time is up", flush=True)
                break
            if "none" not in form and (wrong := arguments[kib].check(form, compiled[kib, form, 1].result())):
                print(f"{kib} KiB {form}: WRONG, {wrong}", flush=True)
                right = False
                continue
            once = known[kib, form] = seconds(compiled[kib, form, LINKS].result(), arguments[kib].values)
            if "none" in form:
                continue
            base = known[kib, "none"]
            microseconds = (once - base) / LINKS * 1e6
            rows.add(f"all_reduce_{mesh.size}gpu_{form}_{kib}k_us", microseconds, "us", command_line("benchmarks.all_reduce"))
            print(f"{kib:6d} KiB {form:12s} {microseconds:8.2f} us ({once * 1e3:.3f} ms a program, {base * 1e3:.3f} without)", flush=True)
        for future in compiled.values():
            future.cancel()
    return right


class Case(NamedTuple):
    """A sum on one GPU; few blocks do several rounds."""

    num_rows: int
    columns: int
    num_parts: int
    dtype: str
    parts_dtype: str
    kind: str
    blocks: int = triton.BLOCKS


CASES = (
    Case(1, 4096, 1, "bfloat16", "bfloat16", "sum"),
    Case(40, 4096, 1, "bfloat16", "bfloat16", "sum", blocks=3),
    Case(3, 4096, 2, "bfloat16", "float32", "norm"),
    Case(13, 5120, 1, "float16", "float16", "norm", blocks=4),
    Case(7, 1000, 3, "float32", "float32", "sum"),
    Case(9, 2048, 1, "float32", "float32", "norm", blocks=2),
    Case(1, 4096, 1, "bfloat16", "bfloat16", "sum"),
    Case(256, 8192, 1, "bfloat16", "bfloat16", "norm", blocks=8),
    Case(7, 1000, 3, "bfloat16", "float32", "two shots"),
    Case(64, 8192, 1, "bfloat16", "bfloat16", "two shots", blocks=5),
    Case(30, 2048, 1, "float32", "float32", "two shots", blocks=2),
    Case(3, 4096, 1, "bfloat16", "bfloat16", "norm"),
    Case(8, 64128, 1, "float32", "float32", "gather"),
    Case(5, 1001, 1, "float32", "float32", "gather", blocks=2),
    Case(24, 32064, 1, "float32", "float32", "deal"),
    Case(48, 5001, 1, "float32", "float32", "deal", blocks=2),
)


def check_case(case: Case, table: jax.Array, seed: int) -> bool:
    """Whether shards that are blocks of one kernel get the right sums, all the same bits."""
    count, dtype = len(table), jnp.dtype(case.dtype)
    random, shape = np.random.default_rng(seed), (case.num_rows, case.columns)
    parts = jnp.asarray(random.standard_normal((count, case.num_parts, *shape)), jnp.float32).astype(case.parts_dtype)
    residual, weight = (jnp.asarray(random.standard_normal(size), jnp.float32).astype(dtype) for size in (shape, case.columns))
    total = jnp.zeros(shape, jnp.float32)
    for shard in parts:
        own = shard[0].astype(jnp.float32)
        for part in shard[1:]:
            own = own + part.astype(jnp.float32)
        total = total + own.astype(dtype).astype(jnp.float32)
    layout, expected = ExchangeLayout.of(count), (total.astype(dtype),)
    if case.kind == "two shots":
        call = functools.partial(triton.all_reduce_two_shot_triton, dtype=dtype, blocks=case.blocks)
        got = (jax.jit(call)(parts.reshape(count, case.num_parts, -1), table).reshape(count, *shape),)
    elif case.kind == "gather":
        # All shards' blocks of 1024 threads must run at once, two on a multiprocessor.
        call = functools.partial(triton.all_gather_triton, blocks=min(case.blocks, 128 // count))
        got = (jax.jit(call)(parts[:, 0], table),)
        expected = (jnp.concatenate(list(parts[:, 0]), axis=1),)
    elif case.kind == "deal":
        call = functools.partial(triton.all_to_all_triton, blocks=min(case.blocks, 128 // count))
        dealt = jax.jit(call)(parts[:, 0], *(jnp.ones((case.num_rows,), jnp.int32),) * 2, table)
        got = (jnp.broadcast_to(jnp.concatenate(list(jnp.swapaxes(dealt, 0, 1))), (count, case.num_rows, count * case.columns)),)
        expected = (jnp.concatenate(list(parts[:, 0]), axis=1),)
    elif case.kind == "norm":
        config = triton.AllReduceConfig.for_rows(case.columns, dtype, layout)
        assert config is not None
        call = functools.partial(triton.all_reduce_add_rms_norm_triton, eps=EPS, config=config, blocks=case.blocks)
        got = jax.jit(call)(parts, jnp.broadcast_to(residual, (count, *shape)), weight, table=table)
        expected = add_rms_norm_reference(expected[0], residual, weight, EPS)
    else:
        config = triton.AllReduceConfig.for_elements(case.num_rows * case.columns, dtype, layout)
        call = functools.partial(triton.all_reduce_triton, dtype=dtype, config=config, blocks=case.blocks)
        got = (jax.jit(call)(parts.reshape(count, case.num_parts, -1), table).reshape(count, *shape),)
    exact = case.kind != "norm"
    right = True
    for y, z in zip(got, expected, strict=True):
        shards, reference = np.asarray(y.astype(jnp.float32)), np.asarray(z.astype(jnp.float32))
        near = 0.0 if exact else 2.0**-6 if dtype.itemsize == 2 else 1e-5
        right &= np.array_equal(shards, shards[:1].repeat(count, 0)) and np.allclose(shards[0], reference, rtol=near, atol=near)
    return bool(right)


def check_on_one_gpu() -> bool:
    """Shards of one device, each with a buffer. All blocks must run at once."""
    right = True
    for count in (2, 3, 4, 8):
        layout = ExchangeLayout.of(count)
        buffers = [jax.block_until_ready(jax.jit(layout.empty)()) for _ in range(count)]
        table = jnp.asarray(peers_table([buffer.unsafe_buffer_pointer() for buffer in buffers]))
        for seed, case in enumerate(CASES):
            good = check_case(case, table, seed)
            print(f"{count} shards, {case}: {'right' if good else 'WRONG'}", flush=True)
            right &= good
        del buffers
    return right


def main() -> None:
    """Read the arguments and measure."""
    parser = argparse.ArgumentParser(description=str(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), metavar="KIB")
    parser.add_argument("--gpus", type=int, help="default: all")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--one-gpu", action="store_true")
    add_row_flags(parser)
    arguments = parser.parse_args()
    watch(arguments.seconds)
    if arguments.one_gpu:
        sys.exit(not check_on_one_gpu())
    mesh = make_mesh(arguments.gpus or len(jax.devices()))
    rows = make_rows(arguments, mesh.devices.flat[0].device_kind)
    if not measure(mesh, arguments.sizes, rows, arguments.seconds):
        sys.exit("some sums are wrong")


if __name__ == "__main__":
    main()
