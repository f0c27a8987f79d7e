"""A real server, launcher and all, with the demo model, shared by all conformance tests."""

import importlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import httpx
import huggingface_hub.constants
import pytest

from jaxserve.config import cache_folder
from jaxserve.weights.demo import _installer

# Few programs to compile, which test_demo_model.py has too.
SIZES = ("--max-batch-size", "4", "--max-batch-prefill-tokens", "128", "--cpu-kv-cache-gib", "0.5")
START_TIME = 180.0  # seconds


@pytest.fixture(scope="session")
def server_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a server that is ready."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    url, log = f"http://127.0.0.1:{port}", tmp_path_factory.mktemp("server") / "log"
    with log.open("wb") as stderr, tempfile.TemporaryDirectory(prefix="js", dir="/tmp") as folder:
        process = subprocess.Popen(
            [sys.executable, "-m", "jaxserve", "--hostname", "127.0.0.1", "--port", str(port), *SIZES],
            stderr=stderr,
            env={**os.environ, "TMPDIR": folder},
        )
        try:
            deadline = time.monotonic() + START_TIME
            while not _healthy(url):
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
            yield url
        finally:
            process.terminate()
            assert process.wait(60) == 0, log.read_text()
    assert "Traceback" not in log.read_text()


def _healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(scope="session")
def text_generation() -> ModuleType:
    """TGI's own client. Its declared bound on huggingface_hub is old, so that it cannot be locked beside the rest; it works."""
    requirements = Path(__file__).parent / "text_generation.txt"
    version = requirements.read_text().split()[0]
    folder = cache_folder() / "clients" / version
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        target = Path(tempfile.mkdtemp(dir=folder.parent))
        flags = ["--quiet", "--no-deps", "--require-hashes", "--only-binary", ":all:", "--target", str(target), "-r", str(requirements)]
        subprocess.run([*_installer(), *flags], check=True, timeout=300)
        try:
            target.rename(folder)
        except OSError:  # another test process was faster
            shutil.rmtree(target)
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module("text_generation")
    finally:
        sys.path.remove(str(folder))


@pytest.fixture
def hub_online(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let huggingface_hub's client speak with this machine; tests are offline otherwise."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
