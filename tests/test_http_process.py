"""An HTTP process: what it imports."""

import os
import subprocess
import sys
from pathlib import Path

from tiny_models import write_tokenizer

PROGRAM = """
import sys
from pathlib import Path
from jaxserve.launcher.http_process import keep_transformers_small
from jaxserve.tokenizer import load_tokenizer
keep_transformers_small()
print(load_tokenizer(Path(sys.argv[1])).encode("ab"))
"""


def test_pytorch_is_not_imported_for_a_tokenizer(tmp_path: Path):
    (tmp_path / "model").mkdir()
    write_tokenizer(tmp_path / "model")
    for name in ("torch", "PIL"):
        (package := tmp_path / "site" / name).mkdir(parents=True)
        (package / "__init__.py").write_text(f"raise SystemExit('{name} was imported')")
    (distribution := tmp_path / "site" / "torch-2.11.0.dist-info").mkdir()
    (distribution / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.11.0\n")
    path = os.pathsep.join([str(tmp_path / "site"), *sys.path])
    run = [sys.executable, "-c", PROGRAM, str(tmp_path / "model")]
    done = subprocess.run(run, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.startswith("["), done.stderr
    without = subprocess.run(
        [*run[:2], PROGRAM.replace("keep_transformers_small()\n", ""), run[3]],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "was imported" in without.stderr
