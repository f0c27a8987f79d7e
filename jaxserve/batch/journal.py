"""Where answers go: one JSON record a line, in the order of the input, so that a killed run can continue.

The file itself is the only state. A record is whole when its line end is there: a kill in mid-write leaves a last line without one,
which is cut off. The records that remain must answer the first lines of the input, one after the other; then the run goes on behind them.
"""

import fcntl
import json
import os
import stat
from collections.abc import Iterator, Mapping
from typing import Any, Self

from jaxserve.batch.lines import Line
from jaxserve.errors import StartupError

RECORD_START = b'{"id": '


class Journal:
    """An output file, opened for this run alone.

    Args:
        path: made where it is missing; "-" is this process's output. A pipe or a device is written from its start.

    Raises:
        StartupError: it cannot be opened, or another run writes to it.
    """

    def __init__(self, path: str):
        self._path = path
        try:
            self._descriptor = os.dup(1) if path == "-" else os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise StartupError(f"cannot write {path}: {error.strerror}") from None
        self._resumable = path != "-" and stat.S_ISREG(os.fstat(self._descriptor).st_mode)
        if self._resumable:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(self._descriptor)
                raise StartupError(f"another run is writing {path}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._descriptor)

    def resume(self, lines: Iterator[Line]) -> int:
        """Take from `lines` those that are answered already, and cut off a half-written record.

        Returns:
            the number of records that were there.

        Raises:
            StartupError: a record does not answer its line: other input, other model, other settings, or no file of answers at all.
                The file is left as it was.
        """
        if not self._resumable:
            return 0
        count, end = 0, 0
        with open(self._path, "rb") as records:
            for raw in records:
                if not raw.endswith(b"\n"):
                    if not raw.startswith(RECORD_START[: len(raw)]):
                        raise StartupError(f"{self._path} does not end in an answer of jaxserve; choose another --output")
                    os.ftruncate(self._descriptor, end)
                    break
                line = next(lines, None)
                if line is None:
                    raise StartupError(f"{self._path} has more records than the input has lines: it answers something else")
                if _digest(raw) != line.digest:
                    raise StartupError(
                        f"{self._path}: record {count + 1} does not answer line {line.number} of the input with this model and these "
                        "settings; choose another --output to start anew"
                    )
                count, end = count + 1, end + len(raw)
        return count

    def append(self, record: Mapping[str, Any]) -> None:
        """Write a record, "id" first, and its line end.

        Raises:
            StartupError: the disk is full or the reader of a pipe went away.
        """
        left = memoryview(json.dumps(record, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
        try:
            while left:
                left = left[os.write(self._descriptor, left) :]
        except OSError as error:
            raise StartupError(f"cannot write {self._path}: {error.strerror}") from None


def _digest(raw: bytes) -> str:
    """The digest in a record of either shape; "" where there is none."""
    try:
        record = json.loads(raw)
        return record["digest"] if "digest" in record else record["id"].removeprefix("batch_req_")
    except (ValueError, TypeError, KeyError, AttributeError):
        return ""
