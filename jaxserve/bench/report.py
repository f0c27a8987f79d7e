"""How figures are shown and kept: lines on the terminal, a JSON file that says what ran on what."""

import json
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from jaxserve.environment import describe_environment
from jaxserve.errors import StartupError

# Figures whose names, which are vLLM's, do not tell their unit.
SECONDS = ("duration", "elapsed_time")


@dataclass(frozen=True, slots=True)
class Report:
    """The outcome of a benchmark.

    Attributes:
        benchmark: "throughput", "latency" or "serve".
        figures: name -> value, in the order to show them; lists are kept but not shown.
        system: what was measured: model, device, mesh, or what the server says of itself.
        options: of the benchmark.
        profile: lines to show after the figures; empty where none was asked for.
    """

    benchmark: str
    figures: Mapping[str, Any]
    system: Mapping[str, Any]
    options: Mapping[str, Any]
    profile: Sequence[str] = ()

    def show(self) -> None:
        """Print the figures, a line each."""
        told = [
            self.system[name] for name in ("model_id", "device", "model_device_type", "mesh", "dtype", "model_dtype") if name in self.system
        ]
        print(f"{self.benchmark}: {', '.join(map(str, told))}")
        for name, value in self.figures.items():
            if isinstance(value, int | float):
                told = f"{value:,}" if isinstance(value, int) else f"{value:,.2f}" if abs(value) >= 10 else f"{value:.4f}"
                print(f"  {name:<28}{told:>14}{' s' if name in SECONDS or name.endswith('_latency') else ''}")
            elif name == "errors":
                print(*(f"  error: {error}" for error in value), sep="\n")
        for line in self.profile:
            print(line)

    def save(self, path: str) -> None:
        """Write everything, with date, command and versions.

        Raises:
            StartupError: the file cannot be written.
        """
        document = {
            "benchmark": self.benchmark,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": shlex.join(sys.argv),
            "figures": self.figures,
            "system": self.system,
            "options": self.options,
            "profile": self.profile,
            "environment": describe_environment(),
        }
        try:
            with open(path, "w", encoding="utf-8") as file:
                json.dump(document, file, indent=2, default=str)
                file.write("\n")
        except OSError as error:
            raise StartupError(f"cannot write {path}: {error.strerror}") from None


def describe_options(*options: Any) -> dict[str, Any]:
    """All fields of several options dataclasses, fit for JSON; no secrets."""
    given = {name: value for part in options for name, value in asdict(part).items() if name != "api_key"}
    return {name: "inf" if value == math.inf else value for name, value in given.items()}
