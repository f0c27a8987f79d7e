"""Which part of jaxserve may import which, read from the syntax trees; and that the host half runs without JAX.

The table is docs/architecture.md's. A part is a package or a module right under jaxserve/.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent / "jaxserve"
PLAIN = {"errors", "config", "request", "grammar", "json_schema"}
ALLOWED: dict[str, set[str]] = {
    # plain types
    "errors": set(),
    "config": {"errors"},
    "json_schema": set(),
    "grammar": {"errors", "json_schema"},
    "request": {"errors", "grammar"},
    "step": set(),
    "page_key": {"request"},
    "page_changes": set(),
    "prefix_match": set(),
    "gguf_header": {"errors"},
    "environment": set(),
    "lowering_processes": set(),
    # host half
    "scheduler": PLAIN | {"step", "page_key", "page_changes", "prefix_match"},
    "tokenizer": {"errors", "request", "gguf_header"},
    "structured": {"errors", "grammar", "json_schema"},
    "hosts": {"errors", "config"},
    "metrics": {"errors", "request"},
    "rpc": {"errors", "request", "grammar", "page_key", "page_changes", "prefix_match", "hosts", "engine"},
    "chat_output": {"grammar", "json_schema", "errors"},
    "http": PLAIN | {"rpc", "tokenizer", "chat_output", "metrics"},
    "launcher": PLAIN | {"rpc", "http", "metrics", "engine", "hosts", "lowering_processes"},
    # device half
    "pallas_kernels": set(),
    "models": {"errors", "pallas_kernels"},
    "weights": {"errors", "config", "gguf_header", "pallas_kernels", "models"},
    "runner": PLAIN | {"step", "lowering_processes", "pallas_kernels", "models", "weights"},
    # where they meet
    "engine": PLAIN | {"step", "lowering_processes", "hosts", "scheduler", "structured", "tokenizer", "models", "weights", "runner"},
    "llm": PLAIN | {"engine", "launcher", "tokenizer", "weights"},
    # what people start
    "client": {"errors"},
    "chat": {"config", "client"},
    "watermark": set(),
    "batch": PLAIN | {"llm", "tokenizer", "http"},
    "bench": PLAIN | {"llm", "tokenizer", "weights", "client", "environment"},
    "cli": PLAIN | {"llm", "batch", "bench", "chat", "launcher", "engine", "environment", "hosts"},
    "integrations": PLAIN | {"cli", "http", "launcher", "metrics"},
    "__main__": {"cli"},
    "__init__": {"request", "llm"},
}
# No part of the server's front half, nor its launcher, may drag JAX in: not even through others.
WITHOUT_JAX = (
    "jaxserve.cli.serve",
    "jaxserve.cli.generate",
    "jaxserve.cli.bench",
    "jaxserve.cli.chat",
    "jaxserve.cli.compile",
    "jaxserve.scheduler",
    "jaxserve.tokenizer",
    "jaxserve.metrics",
    "jaxserve.structured",
    "jaxserve.weights",
    "jaxserve.rpc.client",
    "jaxserve.rpc.server",
    "jaxserve.http.app",
    "jaxserve.launcher",
    "jaxserve.launcher.http_process",
    "jaxserve.launcher.engine_process",
    "jaxserve.launcher.host_process",
    "jaxserve.hosts.leader",
    "jaxserve.hosts.worker",
    "jaxserve.launcher.fellow_hosts",
    "jaxserve.bench.serve",
)
# Formats that run code of whoever wrote them: on no wire and in no cache.
UNSAFE = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}


def files() -> list[Path]:
    """Every source file that people write."""
    return [path for path in sorted(ROOT.rglob("*.py")) if not path.name.endswith("_pb2.py")]


def part_of(module: str) -> str:
    """ "jaxserve.http.app" -> "http"; "jaxserve" -> "__init__"."""
    pieces = module.split(".")
    return pieces[1] if len(pieces) > 1 else "__init__"


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import of a file, also inside functions and `if TYPE_CHECKING`."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            module = node.module or ""
            if module == "jaxserve":
                # `from jaxserve import config` imports the part config, `from jaxserve import SamplingParams` the package itself.
                yield from ((node.lineno, f"jaxserve.{alias.name}" if alias.name in ALLOWED else module) for alias in node.names)
            else:
                yield node.lineno, module


def test_every_part_is_in_the_table() -> None:
    parts = {path.stem if path.suffix == ".py" else path.name for path in ROOT.iterdir() if path.name not in ("__pycache__", "py.typed")}
    assert parts == set(ALLOWED)


def test_the_table_has_no_circle() -> None:
    list(TopologicalSorter(ALLOWED).static_order())


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    part = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for line, module in imports(path):
        if module.split(".")[0] == "jaxserve":
            target = part_of(module)
            assert target == part or target in ALLOWED[part], f"{path}:{line}: {part} must not import {target}"
            if part == "rpc" and target == "engine":
                assert path.name == "server.py", f"{path}:{line}: only rpc/server.py may import the engine"
        assert module.split(".")[0] not in UNSAFE, f"{path}:{line}: {module} runs code from data"
        if part == "scheduler":
            assert module.split(".")[0] in sys.stdlib_module_names | {"jaxserve", "numpy"}, f"{path}:{line}: the scheduler is plain Python"


def test_the_host_half_runs_without_jax() -> None:
    program = (
        "import importlib, sys\n"
        f"for name in {WITHOUT_JAX!r}:\n"
        "    importlib.import_module(name)\n"
        "    dragged = {'jax', 'jaxlib', 'flax', 'torch'} & set(sys.modules)\n"
        "    assert not dragged, f'{name} imports {dragged}'\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
