"""Reading a folder of safetensors files, one or many."""

import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from jaxserve.errors import WeightsError

_REMAP_BYTES = 64 << 20
_DTYPES = {"F64", "F32", "F16", "BF16"}


class SafetensorsCheckpoint:
    """The tensors of a model folder.

    One file is mapped at a time, and mapped anew after each 64 MB read: pages of a mapped file count as memory of the process.

    Args:
        folder: with model.safetensors, or files and model.safetensors.index.json.

    Raises:
        WeightsError: one line, where files are absent, truncated or not safetensors.
    """

    def __init__(self, folder: Path):
        self._file_of: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in _files(folder):
            with _open(path) as file:
                for name in file.offset_keys():
                    tensor = file.get_slice(name)
                    if tensor.get_dtype() not in _DTYPES:
                        raise WeightsError(f"{path.name}: {name} has dtype {tensor.get_dtype()}, which is not supported")
                    if name in self.shapes:
                        raise WeightsError(f"{name} is both in {self._file_of[name].name} and in {path.name}")
                    self._file_of[name], self.shapes[name] = path, tuple(tensor.get_shape())
        self._path: Path | None = None
        self._bytes_read = 0

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Part of a tensor in the dtype of the file."""
        path = self._file_of[name]
        if path != self._path or self._bytes_read > _REMAP_BYTES:
            self._path, self._file, self._bytes_read = path, _open(path), 0
        try:
            part = self._file.get_slice(name)[index]
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{path.name}: {name} cannot be read: {error}") from None
        self._bytes_read += part.nbytes
        return part


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is not a complete safetensors file: {error}") from None


def _files(folder: Path) -> list[Path]:
    """The files that the index names, else model.safetensors, else all there are."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
            paths = [folder / Path(name).name for name in names]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise WeightsError(f"{index} has no readable weight_map") from None
        absent = [path.name for path in paths if not path.is_file()]
        if absent:
            raise WeightsError(f"{folder} lacks {', '.join(absent[:3])}, which {index.name} names")
        return paths
    single = folder / "model.safetensors"
    paths = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if not paths:
        raise WeightsError(f"{folder} holds no safetensors files")
    return paths
