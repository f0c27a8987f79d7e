"""Set up before any test imports jax: 8 fake CPU devices, strict promotion, warnings are errors (pyproject.toml)."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Collectives of 8 fake devices meet in one thread pool; with as many threads as cores (2) they wait for each other until XLA aborts.
os.environ["NPROC"] = "32"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["HF_HUB_OFFLINE"] = "1"
# Containers are often told to write no bytecode: dozens of processes would each parse JAX or transformers, for seconds.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False


def pytest_collection_finish() -> None:
    """What this process compiles, XLA keeps from one run of the tests to the next: the same module gives the same machine code.

    JAX takes the folder of its first compilation for the rest of the process: it shall not depend on which test comes first.
    """
    if "jax" in sys.modules:
        from jaxserve.config import cache_folder
        from jaxserve.runner.compile import use_compilation_cache

        use_compilation_cache(str(cache_folder() / "xla"))


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny random checkpoint by its name in tiny_models.CONFIGS ("llama", "mistral", ...), written once a session."""
    from tiny_models import write_checkpoint

    folders: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in folders:
            folders[name] = write_checkpoint(tmp_path_factory.mktemp(name), name)
        return folders[name]

    return folder


@pytest.fixture(scope="session")
def few_programs(tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A few_programs.Precompiled of the tiny llama: its folder is for tests whose engine processes have these options."""
    from few_programs import precompile

    return precompile(tiny_checkpoint("llama"), tmp_path_factory.mktemp("few_programs"))


@pytest.fixture
def fake_server() -> Iterator[Any]:
    """A fake_server.FakeServer that listens: for tests of clients."""
    from fake_server import FakeServer

    server = FakeServer()
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def front_end(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A live_front_end.LiveFrontEnd on the tiny tokenizer, shared by all tests that leave it as it was."""
    from live_front_end import LiveFrontEnd
    from tiny_models import write_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    live = LiveFrontEnd(folder)
    live.start()
    yield live
    live.stop()


@pytest.fixture(scope="session")
def front_ends(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Any]]:
    """LiveFrontEnds by the name of their chat template in answer_templates.TEMPLATES, started when first asked for."""
    import json

    from answer_templates import TEMPLATES
    from live_front_end import LiveFrontEnd
    from tiny_models import write_tokenizer

    started: dict[str, LiveFrontEnd] = {}

    def start(name: str) -> LiveFrontEnd:
        if name not in started:
            folder = tmp_path_factory.mktemp("tokenizer")
            write_tokenizer(folder)
            settings = json.loads((folder / "tokenizer_config.json").read_text())
            (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATES[name]}))
            started[name] = LiveFrontEnd(folder)
            started[name].start()
        return started[name]

    yield start
    for front_end in started.values():
        front_end.stop()
