"""The README's figures are those of benchmarks/results."""

from pathlib import Path

import pytest

from benchmarks.table import ROOT, put, render, rows


def test_the_readme_holds_the_results():
    readme = (Path(ROOT) / "README.md").read_text()
    assert put(readme, render(rows())) == readme, "run: python -m benchmarks.table"


def test_a_row_stands_beside_its_rival():
    row = dict(name="decode_step_b1_ms", value=4.296, unit="ms", device="NVIDIA H200", jax="0.11.2", commit="abc", date="2026-11-22")
    lines = render([row, row | {"name": "no figure of the table"}]).splitlines()
    assert lines[2] == "| 8B, decode step of 1 request | 4.30 ms | 5.00 ms |"
    assert lines[-1] == "Measured on: NVIDIA H200, jax 0.11.2, commit abc, 2026-11-22." and len(lines) == 5


def test_a_readme_without_marks_is_an_error():
    with pytest.raises(ValueError, match="figures"):
        put("text", "table")
