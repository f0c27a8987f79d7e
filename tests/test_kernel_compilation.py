"""Mosaic's kernels are compiled before the programs that call them: each once, and all before the first program."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.mosaic import gpu as mosaic_gpu
from jax.sharding import AbstractDevice, AbstractMesh

from jaxserve.pallas_kernels.gpu import Gpu
from jaxserve.pallas_kernels.matmul import api, matmul
from jaxserve.runner import kernel_compilation
from jaxserve.runner.kernel_compilation import KernelCompilation, may_have_kernels, mosaic_calls
from jaxserve.runner.lowering import lower
from jaxserve.runner.lowering_process import name_kernels_alike
from jaxserve.runner.programs import Program


def multiply(x: jax.Array, weight: jax.Array) -> jax.Array:
    return matmul(x, weight, x.dtype)


def multiply_twice(x: jax.Array, weight: jax.Array) -> jax.Array:
    return multiply(multiply(x, weight), weight) + 1


def lowered(function: Any) -> bytes:
    """For an H200."""
    arguments = jax.ShapeDtypeStruct((64, 4096), jnp.bfloat16), jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        return lower(Program(jax.jit(function), arguments, None, (), {}), "cuda")


def test_programs_share_their_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "local_gpu", lambda: Gpu(132, True))
    for name in [name for name in os.environ if name.startswith("MOSAIC_GPU_DUMP")]:
        monkeypatch.delenv(name)
    dialect: Any = vars(mosaic_gpu)["dialect"]
    monkeypatch.setattr(dialect, "get_or_set_dump_options", dialect.get_or_set_dump_options)  # to be as it was in the end
    name_kernels_alike()
    (one,), several = mosaic_calls(lowered(multiply)), mosaic_calls(lowered(multiply_twice))
    assert len(one["kernel_hash"]) == 32 and one["module"].startswith(b"ML\xefR")
    assert several and all(call == one for call in several)
    assert mosaic_calls(lowered(jnp.matmul)) == []


class Calls:
    """In the place of mosaic_calls() and _compile_kernel(): "ab" are the kernels a and b."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.compiled: list[str] = []
        self.go_on = threading.Event()
        monkeypatch.setattr(kernel_compilation, "mosaic_calls", lambda lowered: [{"kernel_hash": chr(x)} for x in lowered])
        monkeypatch.setattr(kernel_compilation, "_compile_kernel", self._compile)

    def _compile(self, device: Any, attributes: dict[str, Any]) -> None:
        assert self.go_on.wait(30)
        self.compiled.append(attributes["kernel_hash"])
        if attributes["kernel_hash"] == "x":
            raise ValueError("x is no kernel")


def test_each_kernel_is_compiled_once_and_all_are_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch)
    kernels = KernelCompilation(None, 3)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(kernels.wait)
        kernels.begin(b"ab")
        kernels.begin(None)  # could not be lowered
        calls.go_on.set()
        assert not waiting.done()
        kernels.begin(b"xbc")
        waiting.result(30)  # what x is, its program tells
    assert sorted(calls.compiled) == ["a", "b", "c", "x"]
    kernels.close()


def test_whoever_waits_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch)
    kernels = KernelCompilation(None, 3)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(kernels.wait)
        kernels.close()
        waiting.result(30)
    kernels.begin(b"a")
    assert calls.compiled == []


def test_where_no_thread_can_be_had_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    Calls(monkeypatch)
    kernels = KernelCompilation(None, 2)

    def refuse(*told: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(kernels._threads, "submit", refuse)
    kernels.begin(b"ab")
    kernels.begin(b"c")
    with ThreadPoolExecutor(1) as pool:
        pool.submit(kernels.wait).result(30)
    kernels.close()


def test_hopper_has_kernels() -> None:
    for platform, capability, expected in (("gpu", "9.0", True), ("gpu", "8.0", False), ("gpu", "10.0", False), ("cpu", None, False)):
        assert may_have_kernels(SimpleNamespace(platform=platform, compute_capability=capability)) == expected


def test_a_program_that_cannot_be_read_is_counted() -> None:
    kernels = KernelCompilation(None, 1)
    kernels.begin(b"no module")
    kernels.wait()
    kernels.close()
