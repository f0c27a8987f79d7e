"""Children of the launcher find bytecode in the cache where the installation has none and will get none."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxserve.launcher.bytecode import FOLDER, bytecode_environment


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package without bytecode, to be found by its name."""
    (folder := tmp_path / "site" / "bare_package").mkdir(parents=True)
    (folder / "__init__.py").write_text("NUMBER = 7\n")
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.setattr(sys, "pycache_prefix", None)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return folder


def test_a_child_keeps_bytecode_in_the_cache(package: Path, tmp_path: Path):
    cache = tmp_path / "cache"
    told = bytecode_environment(cache, {}, [package.name])
    environment = {**os.environ, "PYTHONPATH": str(package.parent), "PYTHONDONTWRITEBYTECODE": "1", **told}
    subprocess.run([sys.executable, "-c", "import bare_package"], env=environment, check=True)
    assert [path.parts[len(cache.parts)] for path in cache.rglob("bare_package/*.pyc")] == [FOLDER]
    assert not list(package.rglob("*.pyc"))


def test_nothing_is_told_where_python_needs_no_help(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert bytecode_environment(tmp_path, {}, ["no_such_package"]) == {}
    assert bytecode_environment(tmp_path, {"PYTHONPYCACHEPREFIX": "/elsewhere"}, [package.name]) == {}
    with monkeypatch.context() as patched:
        patched.setattr(sys, "dont_write_bytecode", False)  # Python will write it
        assert bytecode_environment(tmp_path, {}, [package.name]) == {}
        patched.setattr(os, "access", lambda path, mode: False)  # a root may write anywhere
        assert bytecode_environment(tmp_path, {}, [package.name])
    bytecode = Path(importlib.util.cache_from_source(str(package / "__init__.py")))
    bytecode.parent.mkdir()
    bytecode.write_bytes(b"")
    assert bytecode_environment(tmp_path, {}, [package.name]) == {}
