"""Models in several .gguf files, NAME-00001-of-00003.gguf and so on, as llama.cpp's gguf-split writes them. Imports no JAX.

The first has all the metadata. Each tells the number of files (`split.count`), which of them it is (`split.no`, from 0) and how many
tensors they have together (`split.tensors.count`).
"""

import re
from collections.abc import Iterable
from pathlib import Path

from jaxserve.errors import WeightsError
from jaxserve.gguf_header import GGUFHeader, read_gguf_header

_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.gguf)", re.IGNORECASE | re.DOTALL)
_MOST_PARTS = 1000
_NAMES_SHOWN = 3


def part_names(name: str) -> list[str]:
    """Names, or paths, of all files of the model that a file is part of, the first one first; of most models there is one."""
    match = _PART.fullmatch(name)
    if match is None or not 1 <= int(match[2]) <= int(match[3]) <= _MOST_PARTS:
        return [name]
    before, _, count, suffix = match.groups()
    return [f"{before}-{number:05}-of-{count}{suffix}" for number in range(1, int(count) + 1)]


def models_of(names: Iterable[str]) -> list[str]:
    """Of each model in these files the name of its first, in order."""
    return sorted({part_names(name)[0] for name in names})


def read_gguf(path: Path) -> GGUFHeader:
    """The metadata of a model's first file, and the tensors of all of them.

    Raises:
        WeightsError: a file is no GGUF file, damaged, missing, or of another model; one line.
    """
    header = read_gguf_header(path)
    count = header.metadata.get("split.count", 1)
    if not isinstance(count, int) or count <= 1:
        return header
    files = [path.with_name(name) for name in part_names(path.name)]
    if len(files) != count or files[0] != path:
        raise WeightsError(f"{path} is one of {count} files of a model, and its name does not end in -00001-of-{count:05}.gguf")
    if absent := [file.name for file in files if not file.is_file()]:
        more = f" and {len(absent) - _NAMES_SHOWN} more" if len(absent) > _NAMES_SHOWN else ""
        raise WeightsError(f"{path} is the first of {count} files of a model; beside it lacks {', '.join(absent[:_NAMES_SHOWN])}{more}")
    headers = [header, *map(read_gguf_header, files[1:])]
    for number, (file, part) in enumerate(zip(files, headers, strict=True)):
        told = part.metadata.get("split.no"), part.metadata.get("split.count")
        if told != (number, count):
            raise WeightsError(f"{file} says that it is file {told[0]!r:.20} of {told[1]!r:.20}, counted from 0, not {number} of {count}")
    tensors = {name: tensor for part in headers for name, tensor in part.tensors.items()}
    if len(tensors) != sum(len(part.tensors) for part in headers):
        raise WeightsError(f"{path} is damaged: a tensor is in two of its {count} files")
    whole = header.metadata.get("split.tensors.count", len(tensors))
    if whole != len(tensors):
        raise WeightsError(f"{path} and the files beside it have {len(tensors)} tensors, not {whole!r:.20}, as split.tensors.count says")
    return GGUFHeader(header.metadata, tensors)
