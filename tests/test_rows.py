"""Rows of benchmark results: merged by name, with what gave them."""

import json
from pathlib import Path

import pytest

from benchmarks.rows import COMMIT_VARIABLE, Rows, command_line, mesh_prefix
from benchmarks.server import sum_metrics


def test_a_row_takes_the_place_of_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "h200-1.json"
    path.write_text(json.dumps([{"name": "a", "value": 1}, {"name": "b", "value": 2}]))
    rows = Rows(path, "abc1234", "NVIDIA H200")
    rows.add("c", 1.23456, "ms", "python -m benchmarks.engine")
    rows.add("a", 7.0, "ms", "python -m benchmarks.engine")
    rows.add("a", 8.0, "ms", "python -m benchmarks.engine")
    kept = json.loads(path.read_text())
    assert [(row["name"], row["value"]) for row in kept] == [("a", 8.0), ("b", 2), ("c", 1.235)]
    assert set(kept[0]) == {"name", "value", "unit", "command", "device", "jax", "commit", "date"}
    assert kept[0]["commit"] == "abc1234" and kept[0]["device"] == "NVIDIA H200"
    rows.show()
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [["c", "1.235", "ms"], ["a", "8.0", "ms"]]


def test_names_tell_the_mesh():
    assert [mesh_prefix(mesh, "8b") for mesh in ((1, 1), (1, 4), (4, 1), (2, 2))] == ["8b_", "tp4_8b_", "dp4_8b_", "dp2_tp2_8b_"]
    assert [mesh_prefix(mesh, "") for mesh in ((1, 1), (1, 4))] == ["", "tp4_"]
    rows = Rows(None, "abc1234", "NVIDIA H200", "tp4_70b_")
    rows.add("ready_cold_s", 1.0, "s", "x")
    assert rows.added[0]["name"] == "tp4_70b_ready_cold_s"


def test_the_command_is_told_without_what_changes_no_figure():
    given = ["folder", "--results", "x.json", "--only", "decode", "--commit=abc", "--label", "a b"]
    assert command_line("benchmarks.engine", given) == "python -m benchmarks.engine folder --only decode --label 'a b'"


def test_the_commit_is_named_where_there_is_no_git(monkeypatch: pytest.MonkeyPatch):
    import argparse

    from benchmarks.rows import add_row_flags, make_rows

    parser = argparse.ArgumentParser()
    add_row_flags(parser)
    monkeypatch.setenv(COMMIT_VARIABLE, "from-variable")
    for arguments, commit in (([], "from-variable"), (["--commit", "from-flag"], "from-flag")):
        rows = make_rows(parser.parse_args(arguments), "cpu")
        rows.add("a", 1.0, "ms", "x")
        assert rows.added[0]["commit"] == commit


def test_metrics_are_summed_over_labels():
    text = '# HELP a\na{replica="0"} 1.0\na{replica="1"} 2.5\nb 3\n'
    assert sum_metrics(text) == {"a": 3.5, "b": 3.0}
