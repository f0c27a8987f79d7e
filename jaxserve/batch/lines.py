"""Lines of a batch's input: where they come from, and the digest that ties an answer to the line it answers."""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

FORMATS = ("auto", "jsonl", "text")


@dataclass(frozen=True, slots=True)
class Line:
    """One line that wants an answer.

    Attributes:
        number: in the input, from 1; blank lines count but are not answered.
        text: without its line end.
        digest: 16 hex digits over the line and the settings it is answered with.
    """

    number: int
    text: bytes
    digest: str


def read_lines(source: BinaryIO, settings: Mapping[str, Any]) -> Iterator[Line]:
    """The lines of an input that are not blank.

    Args:
        settings: what shapes the answers besides the lines (model, sampling); other settings, other digests.
    """
    told = json.dumps(settings, sort_keys=True, default=str).encode()
    for number, raw in enumerate(source, 1):
        text = raw.strip()
        if text:
            yield Line(number, text, hashlib.sha256(told + b"\n" + text).hexdigest()[:16])


def find_format(name: str, lines: Iterable[Line]) -> tuple[str, Iterator[Line]]:
    """Whether lines are JSON or plain text: by the file's name, else by whether the first one opens an object.

    Returns:
        "jsonl" or "text", and all the lines.
    """
    lines = iter(lines)
    if name.endswith((".jsonl", ".json", ".ndjson")):
        return "jsonl", lines
    if name.endswith(".txt"):
        return "text", lines
    first = list(itertools.islice(lines, 1))
    return "jsonl" if first and first[0].text.startswith(b"{") else "text", itertools.chain(first, lines)


def count_lines(source: BinaryIO) -> int | None:
    """How many lines of a seekable input are not blank; None for a pipe. The source is back at its start."""
    if not source.seekable():
        return None
    count = sum(1 for raw in source if raw.strip())
    source.seek(0)
    return count
