"""Where the time from the start of `jaxserve` to its first 200 of /health goes: the server's log, in seconds since its start.

    python -m benchmarks.start_http FOLDER [--starts cold warm warm] [--server-flags TEXT]

FOLDER holds a config.json and a tokenizer; the weights are random. The flags are those of benchmarks.over_http. A cold start finds an empty
folder of compiled programs, a warm one what the starts before it left. One line of figures comes last.
"""

import argparse
import json
import shlex
import shutil
import tempfile
import time
from datetime import datetime
from pathlib import Path

from benchmarks.server import Server

_TIME_FORMAT, _TIME_LENGTH = "%Y-%m-%d %H:%M:%S,%f", 23
_WIDTH = 150


def timeline(log: str, begin: float) -> list[str]:
    """Lines of a server's log with seconds since `begin` (of time.time()) in place of the date; others as they are."""
    lines = []
    for line in log.splitlines():
        try:
            seconds = datetime.strptime(line[:_TIME_LENGTH], _TIME_FORMAT).timestamp() - begin
        except ValueError:
            lines.append(line[:_WIDTH])
        else:
            lines.append(f"{seconds:6.2f} {line[_TIME_LENGTH + 1 :].removeprefix('INFO ').removeprefix('jaxserve.')}"[:_WIDTH])
    return lines


def start(flags: list[str], log: Path) -> float:
    """Start a server, tell its timeline, end it; returns seconds to ready."""
    begin = time.time()
    try:
        with Server(flags, log) as server:
            seconds = server.ready_seconds
    finally:
        print("\n".join(timeline(log.read_text(errors="replace"), begin)), flush=True)
    return seconds


def main() -> None:
    """Read the arguments and start servers, one after the other."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--starts", nargs="+", choices=("cold", "warm"), default=["cold", "warm", "warm"])
    parser.add_argument("--cache", type=Path, help="folder of compiled programs [a temporary one]")
    parser.add_argument("--server-flags", type=shlex.split, default=[], help="further flags of the server, one text")
    arguments = parser.parse_args()
    figures: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        cache = arguments.cache or Path(temporary) / "cache"
        flags = ["--model-id", arguments.folder, "--load-format", "dummy", "--no-prefix-caching", "--max-total-tokens", "32768"]
        for kind in arguments.starts:
            if kind == "cold":
                shutil.rmtree(cache, ignore_errors=True)
            print(f"-- {kind}", flush=True)
            seconds = start([*flags, "--compilation-cache-dir", str(cache), *arguments.server_flags], Path(temporary) / "log")
            figures.setdefault(f"ready_{kind}_s", []).append(round(seconds, 2))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
