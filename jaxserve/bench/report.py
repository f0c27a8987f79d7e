"""How figures are shown and kept: a table on the terminal, a JSON file that says what ran on what."""

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.table import Table

from jaxserve.environment import describe_environment
from jaxserve.errors import StartupError


@dataclass(frozen=True, slots=True)
class Report:
    """The outcome of a benchmark.

    Attributes:
        benchmark: "throughput", "latency" or "serve".
        figures: name -> value, in the order to show them; lists are kept but not shown.
        system: what was measured: model, device, mesh, or what the server says of itself.
        options: of the benchmark.
    """

    benchmark: str
    figures: Mapping[str, Any]
    system: Mapping[str, Any]
    options: Mapping[str, Any]

    def show(self) -> None:
        """Print a table of the figures."""
        told = ", ".join(str(self.system[name]) for name in ("model_id", "device", "mesh", "dtype") if name in self.system)
        table = Table("figure", title=f"{self.benchmark}: {told}")
        table.add_column("value", justify="right")
        for name, value in self.figures.items():
            if isinstance(value, int | float):
                table.add_row(name, f"{value:,}" if isinstance(value, int) else f"{value:,.2f}")
        Console().print(table)

    def save(self, path: str) -> None:
        """Write everything, with date, command and versions.

        Raises:
            StartupError: the file cannot be written.
        """
        document = {
            "benchmark": self.benchmark,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": " ".join(sys.argv),
            "figures": self.figures,
            "system": self.system,
            "options": self.options,
            "environment": describe_environment(),
        }
        try:
            with open(path, "w", encoding="utf-8") as file:
                json.dump(document, file, indent=2, default=str)
                file.write("\n")
        except OSError as error:
            raise StartupError(f"cannot write {path}: {error.strerror}") from None


def describe_options(*options: Any) -> dict[str, Any]:
    """All fields of several options dataclasses; no secrets."""
    return {name: value for part in options for name, value in asdict(part).items() if name != "api_key"}
