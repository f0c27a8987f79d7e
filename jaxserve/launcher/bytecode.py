"""Where processes find the bytecode of what they import, where the installation has none.

JAX, Flax and transformers are thousands of modules: a process that must parse them takes seconds longer to start. `pip install`
compiles them, `uv pip install` does not, and where Python may not write beside them it parses them anew in every start.
"""

import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

FOLDER = "bytecode"  # in the compilation cache's
# What takes longest to parse of what a process imports.
OF_ENGINE = ("jax", "flax")
OF_HTTP = ("transformers", "fastapi")


def bytecode_environment(cache: Path, environment: Mapping[str, str], packages: Sequence[str]) -> dict[str, str]:
    """Variables that let child processes keep bytecode in the cache; none where it lies beside the packages, or Python will write it there.

    Args:
        cache: of compiled programs; who may write there decides already what is run.
        environment: of the launcher. A PYTHONPYCACHEPREFIX of its own is heeded.
        packages: those that are looked at. The others' bytecode, where it is there, is written once more.
    """
    if environment.get("PYTHONPYCACHEPREFIX") or not any(map(_stays_without, packages)):
        return {}
    return {"PYTHONPYCACHEPREFIX": str(cache.absolute() / FOLDER), "PYTHONDONTWRITEBYTECODE": ""}


def _stays_without(package: str) -> bool:
    """Whether a package is there without its bytecode, which Python will not write beside it."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        return False
    bytecode = Path(importlib.util.cache_from_source(found.origin))
    if bytecode.exists():
        return False
    place = bytecode.parent if bytecode.parent.exists() else bytecode.parent.parent
    return sys.dont_write_bytecode or not os.access(place, os.W_OK)
