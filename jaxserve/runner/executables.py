"""Executables: compiled programs in files, so that a start neither traces nor lowers nor compiles what an earlier one did.

XLA's own cache wants a module first, and making one from what jax.export kept holds the GIL for 0.15 s a program. Here the name of a file
tells all that decides a program. JAX reads its part of such a file with pickle, and XLA's part is machine code: like XLA's cache, the
folder is for nobody to write in but the server's user.
"""

import json
import logging
import os
from pathlib import Path
from typing import Any

import jax
from jax import monitoring
from jax.experimental.serialize_executable import deserialize_and_load, serialize
from jax.sharding import Mesh
from jax.stages import Compiled

from jaxserve.runner.blueprint import Blueprint
from jaxserve.runner.lowering import import_kernel_libraries
from jaxserve.runner.program_store import ProgramStore
from jaxserve.runner.programs import Program, ProgramKey

logger = logging.getLogger(__name__)

# JAX's events of its own cache have such names.
FOUND_EVENT, KEPT_EVENT = "/jaxserve/executables/found", "/jaxserve/executables/kept"


class Executables:
    """Those of one mesh. May be used by several threads at once.

    Args:
        folder: of the files; None keeps nothing.
        mesh: its devices, all of this process.

    Attributes:
        kept: whether there is a folder.
    """

    def __init__(self, folder: Path | None, mesh: Mesh):
        self.kept = folder is not None
        self._store = ProgramStore(folder)
        self._devices = list(mesh.devices.flat)
        self._compiler = json.dumps(describe_compiler(mesh))

    def has(self, blueprint: Blueprint, key: ProgramKey) -> bool:
        """Whether there is a file for a program; load() may still find it damaged."""
        return self._store.has(self._name(blueprint, key))

    def load(self, blueprint: Blueprint, key: ProgramKey, program: Program) -> Compiled | None:
        """A program that was kept; None where there is none that works."""
        if (data := self._store.read(self._name(blueprint, key))) is None:
            return None
        import_kernel_libraries(blueprint.platform)
        in_tree, out_tree = _trees(program)
        try:
            compiled = deserialize_and_load(data, in_tree, out_tree, self._devices[0].client, self._devices)
        except Exception as error:  # whatever JAX, pickle or XLA say: it can be compiled again
            logger.warning("%s has to be compiled again: %s: %s", key.name, type(error).__name__, str(error).splitlines()[:1])
            return None
        monitoring.record_event(FOUND_EVENT)
        return compiled

    def keep(self, blueprint: Blueprint, key: ProgramKey, program: Program, compiled: Compiled) -> None:
        """Keep a program. Where that cannot be, the next start takes longer, and it is no error."""
        if not self.kept:
            return
        try:
            data, *trees = serialize(compiled)
        except Exception as error:  # a backend that cannot, or what JAX does not serialize
            logger.warning("%s is not kept compiled: %s: %s", key.name, type(error).__name__, str(error).splitlines()[:1])
            return
        assert tuple(trees) == _trees(program), f"the results of {key.name} are declared otherwise"
        self._store.write(self._name(blueprint, key), data)
        monitoring.record_event(KEPT_EVENT)

    def clean(self, most_bytes: int) -> None:
        """Delete those that nobody has used for long; as `ProgramStore.clean`."""
        self._store.clean(most_bytes)

    def _name(self, blueprint: Blueprint, key: ProgramKey) -> str:
        return blueprint.digest(f"executable {key.name} {self._compiler}")


def describe_compiler(mesh: Mesh) -> list[Any]:
    """What XLA's choices depend on beside the module: its version and flags, the devices' numbers, and a CPU's instructions."""
    device = mesh.devices.flat[0]
    instructions = _instructions() if device.platform == "cpu" else ""
    numbers = [each.id for each in mesh.devices.flat]
    return [device.client.platform_version, os.environ.get("XLA_FLAGS", ""), numbers, instructions]


def _instructions() -> str:
    """The sets of instructions that this machine's CPU has, as Linux tells them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _trees(program: Program) -> tuple[Any, Any]:
    """Of the arguments, with no keywords, and of the results."""
    return jax.tree.structure((program.arguments, {})), jax.tree.structure(program.results)
