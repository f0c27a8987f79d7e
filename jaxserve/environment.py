"""What this runs on: versions, devices and machine, for bug reports and beside benchmark figures. Never imports jax."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path

PACKAGES = ("jaxserve", "jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "flax", "transformers", "tokenizers", "numpy", "grpcio")


def describe_environment() -> dict[str, str]:
    """Names and values, in the order to show them; what is not there is left out."""
    facts = {
        "commit": commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": f"{_cpu_name()}, {len(os.sched_getaffinity(0))} cores",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "gpu": _run("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader").replace("\n", "; "),
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
    }
    return {name: value for name, value in (versions() | facts).items() if value}


def versions() -> dict[str, str]:
    """Versions of the packages that a figure or a bug depends on."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """Commit of the checkout this runs from, "+" behind it where files were changed; "" outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return ""
    revision = _run("git", "-C", str(root), "rev-parse", "--short=12", "HEAD")
    changed = _run("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return revision + ("+" if changed else "")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _run(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    return done.stdout.strip() if done.returncode == 0 else ""
