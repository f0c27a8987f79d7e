"""Rows of `benchmarks/results/*.json`: one figure each, with the command and the build that gave it.

A row is {"name", "value", "unit", "command", "device", "jax", "commit", "date"}. A new row takes the place of the one of its name.
"""

import argparse
import datetime
import json
import os
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from jaxserve.environment import commit

COMMIT_VARIABLE = "JAXSERVE_COMMIT"  # names the commit where a copy of the tree has no git
_NOT_PART_OF_THE_COMMAND = ("--results", "--commit")


class Rows:
    """The rows of a file.

    Args:
        path: where they are kept; None keeps none.
        commit: of the tree that is measured.
        device: for people, "NVIDIA H200".
        prefix: beginning of all names, e.g. of `mesh_prefix`.
    """

    def __init__(self, path: Path | None, commit: str, device: str, prefix: str = ""):
        self._path = path
        self._commit = commit
        self._device = device
        self._prefix = prefix
        self.added: list[dict[str, object]] = []

    def add(self, name: str, value: float, unit: str, command: str) -> None:
        """Keep a figure, at once: a run that is cut short keeps what it had."""
        name = self._prefix + name
        row: dict[str, object] = dict(name=name, value=round(value, 3), unit=unit, command=command, device=self._device)
        row |= dict(jax=version("jax"), commit=self._commit, date=datetime.datetime.now(datetime.UTC).date().isoformat())
        self.added = [other for other in self.added if other["name"] != name] + [row]
        if self._path is None:
            return
        rows = {other["name"]: other for other in json.loads(self._path.read_text())} if self._path.exists() else {}
        rows[name] = row
        whole = self._path.with_name(self._path.name + ".part")
        whole.write_text(json.dumps(list(rows.values()), indent=1) + "\n")
        whole.replace(self._path)

    def show(self) -> None:
        """Print what was added, a short table."""
        for row in self.added:
            print(f"{row['name']:36s} {row['value']:>14,} {row['unit']}")


def add_row_flags(parser: argparse.ArgumentParser) -> None:
    """--results and --commit."""
    parser.add_argument("--results", type=Path, help="file of rows to write; rows of the same name are replaced")
    parser.add_argument("--commit", help=f"of the tree that is measured [${COMMIT_VARIABLE}, or what git says]")


def make_rows(arguments: argparse.Namespace, device: str, prefix: str = "") -> Rows:
    """The rows that the parsed flags of `add_row_flags` speak of."""
    return Rows(arguments.results, arguments.commit or os.environ.get(COMMIT_VARIABLE, "") or commit(), device, prefix)


def mesh_prefix(mesh: tuple[int, int], label: str) -> str:
    """Beginning of the names of a mesh's rows: "tp4_70b_", "dp4_8b_", "dp2_tp2_8b_"; of one device the label alone, "" without."""
    sizes = [f"{kind}{size}" for kind, size in zip(("dp", "tp"), mesh, strict=True) if size > 1]
    return "".join(f"{part}_" for part in (*sizes, label) if part)


def command_line(module: str, arguments: Sequence[str] | None = None) -> str:
    """How the running program was called, without the flags that change no figure."""
    kept: list[str] = []
    given = iter(sys.argv[1:] if arguments is None else arguments)
    for word in given:
        if word in _NOT_PART_OF_THE_COMMAND:
            next(given, None)
        elif not word.startswith(tuple(f"{flag}=" for flag in _NOT_PART_OF_THE_COMMAND)):
            kept.append(word)
    return shlex.join(["python", "-m", module, *kept])
