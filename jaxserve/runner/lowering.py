"""Lowering: from a program to a module for XLA, as bytes; and from these to what runs.

Tracing and lowering hold the GIL for up to a second a program, most of it in Pallas. So that a start does it once for ever, a runner
compiles every program from an exported module (jax.export), whether that was made in this process, in another one or in an earlier start.
"""

from typing import Any

import jax
from jax import export
from jax.sharding import Mesh, NamedSharding
from jax.stages import Compiled

from jaxserve.runner.programs import Program

# Modules are read by the version that wrote them, on the machine that did: no custom call has to be stable beyond that.
_ANY_CUSTOM_CALL = export.DisabledSafetyCheck.custom_call("ALL")


def lower(program: Program, platform: str) -> bytes:
    """Trace and lower a program; its device need not be there.

    Args:
        platform: to compile for: "cpu", "cuda".
    """
    jax.config.update("jax_export_ignore_forward_compatibility", True)
    exported = export.export(program.function, platforms=(platform,), disabled_checks=(_ANY_CUSTOM_CALL,))(*program.arguments)
    return bytes(exported.serialize())


def compile_lowered(lowered: bytes, program: Program, mesh: Mesh) -> Compiled:
    """Compile what lower() gave, or take it from XLA's own cache. Traces nothing of the program.

    Args:
        program: what was lowered.
        mesh: its devices.
    """
    exported = export.deserialize(bytearray(lowered))
    for platform in exported.platforms:
        import_kernel_libraries(platform)

    def call(*arguments: Any) -> Any:
        return exported.call(*arguments)

    def place(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, x.sharding.spec))

    call.__name__ = exported.fun_name  # as a profile shows it
    out_shardings = jax.tree.unflatten(exported.out_tree, exported.out_shardings_jax(mesh))
    function = jax.jit(call, donate_argnums=program.donated, out_shardings=out_shardings, compiler_options=program.options)
    return function.lower(*jax.tree.map(place, program.arguments)).compile()


def import_kernel_libraries(platform: str) -> None:
    """Tell XLA where Mosaic's runtime library is, by variables: where no kernel was lowered in this process nothing else does.

    Args:
        platform: of the programs: "cpu", "cuda".
    """
    if platform == "cuda":
        from jax.experimental.mosaic import gpu  # noqa: F401  importing it sets them
