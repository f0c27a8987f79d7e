"""Benchmarks over HTTP, and the parts of scripts/measure_gpu that run them: rows' names and rates, against a fake server."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Barrier, BrokenBarrierError
from types import ModuleType
from typing import Any

import pytest
from fake_server import FakeServer

from benchmarks import http_scaling, over_http
from benchmarks.http_scaling import Load, Span, offer, rate
from benchmarks.over_http import Prompts

ROOT = Path(__file__).resolve().parent.parent
STUB = '#!/bin/sh\necho "$@" >> "$CALLS"\n'  # a python that only tells how it was called


@pytest.fixture
def measured(
    fake_server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[dict[str, float], list[list[str]]]]:
    """Runs a benchmark's main; returns its rows' values by name, and the flags of each server that it started."""
    (tmp_path / "config.json").write_text('{"vocab_size": 100}')
    started: list[list[str]] = []

    class Server:
        url, ready_seconds = fake_server.url, 1.5

        def __init__(self, flags: list[str], log: Path):
            started.append(flags)

        def __enter__(self) -> "Server":
            return self

        def __exit__(self, *error: object) -> None: ...

        def metrics(self) -> dict[str, float]:
            return {f"jaxserve_{name}_total": 0.0 for name in ("padded_tokens", "useful_tokens", "steps", "compile_events")}

    def run(module: ModuleType, *flags: str) -> tuple[dict[str, float], list[list[str]]]:
        monkeypatch.setattr(module, "Server", Server)
        results = tmp_path / "rows.json"
        sizes = ["--tokens-in", "2", "--tokens-out", str(len(fake_server.pieces)), "--results", str(results)]
        monkeypatch.setattr(sys, "argv", ["benchmark", str(tmp_path), *flags, *sizes])
        module.main()
        return {row["name"]: row["value"] for row in json.loads(results.read_text())}, started

    return run


def test_rows_over_http_on_a_mesh(measured: Callable[..., Any]):
    rows, started = measured(over_http, "--mesh", "1x4", "--label", "70b", "--loads", "2:3", "--repetitions", "1")
    names = {"ready_cold_s", "ready_warm_s", "http_c2_tok_s", "http_c2_ttft_ms", "http_c2_tpot_ms"}
    assert set(rows) == {f"tp4_70b_{name}" for name in names} and rows["tp4_70b_ready_cold_s"] == 1.5
    assert len(started) == 2 and all(flags[flags.index("--mesh") + 1] == "1x4" for flags in started)


def test_what_replicas_add(measured: Callable[..., Any], fake_server: FakeServer):
    """Two client processes offer as much for each replica as one does for one."""
    rows, started = measured(http_scaling, "--mesh", "2x1", "--label", "8b", "--streams", "3", "--prompts", "6", "--repetitions", "1")
    assert set(rows) == {"dp2_8b_http_scaling", "dp2_8b_http_c6_tok_s", "dp2_8b_http_one_replica_c3_tok_s"}
    assert [flags[flags.index("--mesh") + 1] for flags in started] == ["1x1", "2x1"]
    assert len(fake_server.bodies) == 4 + 6 + 2 * (4 + 6)
    prompts = [tuple(body["prompt"]) for body in fake_server.bodies[-12:]]
    assert len(set(prompts)) > 6, "the clients were meant to have prompts of their own"
    assert rows["dp2_8b_http_scaling"] == pytest.approx(rows["dp2_8b_http_c6_tok_s"] / rows["dp2_8b_http_one_replica_c3_tok_s"], 1e-3)


def test_a_rate_is_of_all_from_the_first_to_the_last():
    assert rate([Span(10.0, 12.0, 100.0, 0.1), Span(10.5, 15.0, 150.0, 0.1)]) == 50.0


def test_clients_begin_together(fake_server: FakeServer):
    """Where another one does not come, nothing is sent."""
    (together := Barrier(2)).abort()
    with pytest.raises(BrokenBarrierError):
        offer(fake_server.url, Prompts("m", 100), Load(1, 1, 1, 1), together)
    assert not fake_server.bodies


def test_one_replica_does_not_scale(measured: Callable[..., Any], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        measured(http_scaling, "--mesh", "1x4")
    assert "--mesh 1x4 has one replica" in capsys.readouterr().err


def test_parts_for_four_gpus(tmp_path: Path):
    """Each measures on four, and keeps its rows in h200-4.json."""
    (stub := tmp_path / "python").write_text(STUB)
    stub.chmod(0o755)
    calls, out = tmp_path / "calls", tmp_path / "out"
    environment = os.environ | {"PYTHON": str(stub), "CALLS": str(calls), "OUT": str(out)}
    for name in ("llama-3.1-8b", "llama-3.1-70b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(name)
    command = ["scripts/measure_gpu", str(tmp_path), "all-reduce-4", "tp4-70b", "tp4-8b", "dp4-8b"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    measured = [line for line in calls.read_text().splitlines() if line.startswith("-m benchmarks")]
    assert all(line.endswith(f"--results {out}/h200-4.json") for line in measured)
    wanted = ["all_reduce --gpus 4", "over_http --mesh 1x4 --label 70b", "engine --mesh 1x4 --label 70b", "engine --mesh 1x4 --label 8b"]
    wanted.append("http_scaling --mesh 4x1 --label 8b")
    assert len(measured) == len(wanted)
    for line, words in zip(measured, wanted, strict=True):
        assert line.startswith(f"-m benchmarks.{words.split()[0]} ") and set(words.split()[1:]) < set(line.split()), line
