"""Compiling the kernels that Mosaic wrote before the programs that call them.

XLA compiles such a kernel where it comes upon the call, in the one thread that goes through the program's calls, and LLVM's options are the
process's: Mosaic's differ from XLA's, so while one thread has either, all that want the other wait (LLVMCommandLineOptionsLock in XLA's
service/llvm_ir/llvm_command_line_options.h). Programs compiled side by side so take half of a machine's CPUs. A kernel is kept by its hash,
though, for as long as the process lives. So first all kernels are compiled, side by side and each once, and then the programs, which find
them.
"""

import logging
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from jax import export
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo
from jax.interpreters import mlir
from jax.sharding import SingleDeviceSharding

from jaxserve.runner.compile import keep_out_of_cache
from jaxserve.runner.lowering import import_kernel_libraries

logger = logging.getLogger(__name__)

MOSAIC_TARGET = "mosaic_gpu_v2"
_HASH = "kernel_hash"


class KernelCompilation:
    """Compiles the Mosaic kernels of so many programs, each kernel once. Its methods may be called by several threads.

    Args:
        device: of the programs.
        num_programs: how many there will be.
    """

    def __init__(self, device: Any, num_programs: int):
        self._device = device
        self._to_come = num_programs
        self._all_told = threading.Event()
        self._lock = threading.Lock()
        self._kernels: dict[bytes, Future[None]] = {}
        # More than there are CPUs: who has compiled a kernel waits for the others that do before XLA goes on.
        self._threads = ThreadPoolExecutor(2 * len(os.sched_getaffinity(0)), thread_name_prefix="kernels")

    def begin(self, lowered: bytes | None) -> None:
        """Begin to compile the kernels of one program that none before it had.

        Args:
            lowered: what lowering.lower() gave; None: it could not be lowered.
        """
        try:
            calls = [] if lowered is None else mosaic_calls(lowered)
        except Exception as error:  # whatever MLIR says: XLA finds the kernels itself, and a start is only slower
            logger.warning("the kernels of a program are not compiled before it: %s: %s", type(error).__name__, str(error).splitlines()[:1])
            calls = []
        with self._lock:
            try:
                for attributes in calls:
                    if attributes[_HASH] not in self._kernels and not self._all_told.is_set():
                        self._kernels[attributes[_HASH]] = self._threads.submit(_compile_kernel, self._device, attributes)
            except Exception as error:  # no thread more, or the interpreter ends
                logger.warning("kernels are not compiled before their programs: %s", error)
            finally:
                self._to_come -= 1
                if not self._to_come:
                    self._all_told.set()

    def wait(self) -> None:
        """Wait until begin() was called for every program and all kernels are compiled. One that cannot be is left to its programs, which
        tell why.
        """
        self._all_told.wait()
        for kernel in list(self._kernels.values()):
            if error := kernel.exception():
                logger.debug("a kernel could not be compiled before its programs: %s", error)

    def close(self) -> None:
        """Compile no more, and let go whoever waits."""
        with self._lock:
            self._all_told.set()
        self._threads.shutdown(wait=False, cancel_futures=True)


def may_have_kernels(device: Any) -> bool:
    """Whether programs for a device may call such kernels: on GPUs of the Hopper kind. Others would wait for nothing."""
    return device.platform == "gpu" and str(getattr(device, "compute_capability", "")) == "9.0"


def mosaic_calls(lowered: bytes) -> list[dict[str, Any]]:
    """The attributes of the calls of Mosaic's kernels in a program that lowering.lower() gave."""
    calls: list[dict[str, Any]] = []

    def visit(operation: Any) -> ir.WalkResult:
        if operation.name == "stablehlo.custom_call" and operation.attributes["call_target_name"].value == MOSAIC_TARGET:
            attributes = {item.name: item.attr for item in operation.attributes["mhlo.backend_config"]}
            calls.append({name: x.value_bytes if isinstance(x, ir.StringAttr) else x.value for name, x in attributes.items()})
        return ir.WalkResult.ADVANCE

    module = export.deserialize(bytearray(lowered)).mlir_module_serialized
    with mlir.make_ir_context() as context:
        stablehlo.deserialize_portable_artifact(context, module).operation.walk(visit)
    return calls


def _compile_kernel(device: Any, attributes: dict[str, Any]) -> None:
    """Compile a program that does nothing but call the kernel. It is never run: what the kernel takes and gives is of no matter."""

    def call() -> jax.Array:
        return jax.ffi.ffi_call(MOSAIC_TARGET, jax.ShapeDtypeStruct((), jnp.uint8))(**attributes)

    import_kernel_libraries("cuda")
    with keep_out_of_cache():
        jax.jit(call, out_shardings=SingleDeviceSharding(device)).lower().compile()
