"""What a user installs: dependencies declared, locks whole, the wheel complete, no address of any registry."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCKS = ("base", "test", "cuda12", "cuda13")
# Needs packages of the machine that wrote the goldens or ran the peers; see there.
OTHER_ENVIRONMENTS = {"write_goldens.py", "write_quantized_goldens.py", "write_calibrated_checkpoint.py", "cpu_peers.py"}

# A namespace package belongs to whoever provides the part below it.
NAMESPACES = {"google": ["protobuf"], "opentelemetry": ["opentelemetry-sdk"]}


def canonical(name: str) -> str:
    """PEP 503's form of a package's name."""
    return re.sub(r"[-_.]+", "-", name).lower()


def names(requirements: Iterable[str]) -> set[str]:
    return {canonical(re.split(r"[\[<>=~!; ]", requirement, maxsplit=1)[0]) for requirement in requirements}


def pins(lock: str) -> dict[str, str]:
    """Package -> version of a lock."""
    found = re.findall(r"^([A-Za-z0-9._-]+)(?:\[[^]]*\])?==([^ ;\\]+)", (ROOT / "requirements" / f"{lock}.txt").read_text(), re.MULTILINE)
    return {canonical(name): version for name, version in found}


def third_party(folder: str) -> dict[str, str]:
    """Distribution -> a file of the folder that imports it."""
    provided, used = packages_distributions(), {}
    local = {path.stem for path in (ROOT / folder).rglob("*.py")} | {"jaxserve", "jaxlib", "benchmarks"}
    for path in (ROOT / folder).rglob("*.py"):
        if path.name in OTHER_ENVIRONMENTS:
            continue
        for node in ast.walk(ast.parse(path.read_bytes())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module or ""]
            for module in modules:
                top = module.split(".")[0]
                if top not in sys.stdlib_module_names | local:
                    found = NAMESPACES.get(top) or provided.get(top, [top])
                    used[canonical(found[0])] = str(path.relative_to(ROOT))
    return used


def test_every_import_is_a_declared_dependency() -> None:
    extras = PROJECT["optional-dependencies"]
    declared = names(PROJECT["dependencies"]) | names(extras["otlp"]) | names(extras["ray"])
    assert {name: where for name, where in third_party("jaxserve").items() if name not in declared} == {}
    declared |= names(extras["test"])
    assert {name: where for name, where in (third_party("tests") | third_party("scripts")).items() if name not in declared} == {}


def test_locks_hold_every_dependency_by_version_and_hash() -> None:
    assert sorted(path.stem for path in (ROOT / "requirements").glob("*.txt")) == sorted(LOCKS)
    extras = PROJECT["optional-dependencies"]
    base = pins("base")
    for lock in LOCKS:
        held = pins(lock)
        assert names(PROJECT["dependencies"]) | names(extras.get(lock, ())) | {"setuptools"} <= set(held), lock
        assert base.items() <= held.items(), f"{lock} differs from base: run ./scripts/lock"
        text = (ROOT / "requirements" / f"{lock}.txt").read_text()
        blocks = re.split(r"^(?=[A-Za-z0-9])", text, flags=re.MULTILINE)[1:]
        assert len(blocks) == len(held) and all("--hash=sha256:" in block for block in blocks), lock
    assert base["jax"] == base["jaxlib"] == "0.11.2"


def test_locks_name_no_registry_and_no_torch() -> None:
    for lock in LOCKS:
        text = (ROOT / "requirements" / f"{lock}.txt").read_text()
        assert "://" not in text and "index" not in text.lower() and "find-links" not in text
        assert not {"torch", "torchvision", "triton", "tensorflow"} & set(pins(lock)), lock


def test_the_wheel_is_complete(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(ROOT / "jaxserve", source / "jaxserve", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)], cwd=source, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = {str(path.relative_to(source)) for path in (source / "jaxserve").rglob("*") if path.is_file()}
    assert wanted <= held and not any(name.startswith("tests/") for name in held)
    entry = next(name for name in held if name.endswith("entry_points.txt"))
    commands = zipfile.ZipFile(wheel).read(entry).decode()
    assert all(f"\n{name} = jaxserve.cli:main" in commands for name in ("jaxserve", "text-generation-launcher"))


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "scripts").iterdir() if path.suffix == ""))
def test_scripts_are_runnable(script: str) -> None:
    path = ROOT / "scripts" / script
    assert path.stat().st_mode & 0o111 and path.read_text().startswith("#!/usr/bin/env bash\n")
    subprocess.run(["bash", "-n", str(path)], check=True, timeout=10)


def test_install_says_what_is_missing(tmp_path: Path) -> None:
    """Without Python 3.12 and uv there is one clear line, and nothing is left behind."""
    for name in ("scripts", "requirements"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("bash", "dirname", "cat", "rm", "sha256sum", "env"):
        (tools / tool).symlink_to(shutil.which(tool) or "")
    done = subprocess.run(
        [tmp_path / "scripts" / "install"], env={"PATH": str(tools)}, capture_output=True, text=True, check=False, timeout=30
    )
    assert done.returncode == 1 and "Python 3.12" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / ".venv").exists()
