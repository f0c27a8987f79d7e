"""Reading a folder of safetensors files, one or many."""

import json
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxserve.errors import WeightsError

_DTYPES = {
    name: np.dtype(dtype)
    for name, dtype in {
        **{"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16, "BOOL": np.bool_},
        **{"F8_E4M3": jnp.float8_e4m3fn, "F8_E5M2": jnp.float8_e5m2, "F8_E8M0": np.uint8},
        **{f"{kind}{bits}": f"{kind.lower()}{bits // 8}" for kind in "IU" for bits in (8, 16, 32, 64)},
    }.items()
}


class SafetensorsCheckpoint:
    """The tensors of a model folder.

    safetensors checks the files. What is read is mapped for as long as it is copied, since pages of a mapped file count as memory of the
    process; threads read beside each other.

    Args:
        folder: with model.safetensors, or files and model.safetensors.index.json.

    Raises:
        WeightsError: one line, where files are absent, truncated or not safetensors.
    """

    def __init__(self, folder: Path):
        self._file_of: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._offsets: dict[str, int] = {}
        for path in _files(folder):
            with _open(path) as file:
                for name in file.offset_keys():
                    tensor = file.get_slice(name)
                    if name in self.shapes:
                        raise WeightsError(f"{name} is both in {self._file_of[name].name} and in {path.name}")
                    self._file_of[name], self.shapes[name], self.dtypes[name] = path, tuple(tensor.get_shape()), tensor.get_dtype()
            self._offsets |= _offsets(path)

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Part of a tensor in the dtype of the file. From any thread."""
        path, shape = self._file_of[name], self.shapes[name]
        if (dtype := _DTYPES.get(self.dtypes[name])) is None:
            raise WeightsError(f"{path.name}: {name} is {self.dtypes[name]}, which is not read")
        if 0 in shape:
            return np.empty(shape, dtype)[index]
        try:
            return np.array(np.memmap(path, dtype, "r", self._offsets[name], shape)[index])
        except (ValueError, OSError) as error:  # the file has become shorter, or is gone
            raise WeightsError(f"{path.name}: {name} cannot be read: {error}") from None


def _offsets(path: Path) -> dict[str, int]:
    """Where the data of each tensor begins in a file that safetensors has opened."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    return {name: 8 + size + tensor["data_offsets"][0] for name, tensor in header.items() if name != "__metadata__"}


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
        absent = [path.name for path in paths if not os.path.isfile(path)]  # which takes any name
        if absent:
            raise WeightsError(f"{folder} lacks {', '.join(absent[:3])}, which {index.name} names")
        return paths
    single = folder / "model.safetensors"
    # What is no file, as a pipe that nobody writes to, could be waited for without end.
    paths = [single] if single.is_file() else sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    if not paths:
        raise WeightsError(f"{folder} holds no safetensors files")
    return paths
