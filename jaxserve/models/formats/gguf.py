"""The quantization types of GGUF files whose blocks stay quantized (github.com/ggml-org/ggml, ggml-common.h and ggml-quants.c)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from jaxserve.models.formats.scheme import Scheme, Tensors, Unpacked
from jaxserve.models.parameters import Stored
from jaxserve.pallas_kernels import Layout

BLOCKS = ".blocks"
"""What is added to a matrix's name to read its bytes, uint8 [n, bytes a row], in place of its elements."""


@dataclass(frozen=True)
class BlockType:
    """A type of blocks.

    Attributes:
        size: elements of a block.
        nbytes: of a block.
        layout: on the devices.
        unpack: (bytes [blocks, nbytes]) -> codes int8 [blocks, size], scales and, where the layout has them, minimums, float32
            [blocks, groups].
    """

    size: int
    nbytes: int
    layout: Layout
    unpack: Callable[[np.ndarray], tuple[np.ndarray, ...]]


@dataclass(frozen=True)
class GGUFTypes:
    """What stands for the quantization_config of a .gguf file, and in no config.json: the type of each matrix that stays quantized."""

    types: Mapping[str, str]


def gguf_scheme(kind: str) -> Scheme:
    """Of matrices of a type in BLOCK_TYPES."""
    layout = BLOCK_TYPES[kind].layout
    return Scheme("gguf", layout, layout.group, variant=kind)


class GGUFStorage:
    """Matrices of blocks."""

    def tensors(self, scheme: Scheme, module: str, n: int, k: int) -> tuple[Stored, ...]:
        """As in `Storage`."""
        del scheme
        return (Stored(f"{module}.weight", (n, k)),)

    def read(self, scheme: Scheme, tensors: Tensors, module: str, rows: slice, columns: slice) -> Unpacked:
        """As in `Storage`."""
        kind, layout = BLOCK_TYPES[scheme.variant], scheme.layout
        first, last = columns.start // kind.size, -(-columns.stop // kind.size)
        packed = tensors.read(f"{module}.weight{BLOCKS}", (rows, slice(first * kind.nbytes, last * kind.nbytes)))
        n = len(packed)
        codes, *groups = kind.unpack(np.ascontiguousarray(packed).reshape(-1, kind.nbytes))
        begin = columns.start - first * kind.size
        k = columns.stop - columns.start
        taken = np.arange(begin, begin + k, layout.group_of(k)) // layout.group
        names = ("scales", "minimums")[: len(groups)]
        part = {name: values.reshape(n, -1)[:, taken] for name, values in zip(names, groups, strict=True)}
        return {"codes": codes.reshape(n, -1)[:, begin : begin + k], **part}


def _halves(packed: np.ndarray) -> np.ndarray:
    """The low halves of bytes [..., m], then the high ones: int8 [..., 2 m]."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1).view(np.int8)


def _float16(data: np.ndarray) -> np.ndarray:
    """Float16 numbers of bytes [blocks, 2], as float32 [blocks, 1]."""
    return np.ascontiguousarray(data).view(np.float16).astype(np.float32)


def _q4_0(data: np.ndarray) -> tuple[np.ndarray, ...]:
    return _halves(data[:, 2:]) - np.int8(8), _float16(data[:, :2])


def _q4_1(data: np.ndarray) -> tuple[np.ndarray, ...]:
    return _halves(data[:, 4:]), _float16(data[:, :2]), _float16(data[:, 2:4])


def _q8_0(data: np.ndarray) -> tuple[np.ndarray, ...]:
    return data[:, 2:].view(np.int8), _float16(data[:, :2])


def _scales_of_8_groups(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales and offsets float32 [blocks, 8] of 8 groups, from its head: two float16, then 16 numbers of 6 bits."""
    low, middle, rest = data[:, 4:8], data[:, 8:12], data[:, 12:16]
    scales = np.concatenate([low & 63, (rest & 15) | ((low >> 6) << 4)], axis=1)
    offsets = np.concatenate([middle & 63, (rest >> 4) | ((middle >> 6) << 4)], axis=1)
    return _float16(data[:, :2]) * scales.astype(np.float32), _float16(data[:, 2:4]) * offsets.astype(np.float32)


def _q4_k(data: np.ndarray) -> tuple[np.ndarray, ...]:
    scales, offsets = _scales_of_8_groups(data)
    return _halves(data[:, 16:].reshape(-1, 4, 32)).reshape(-1, 256), scales, -offsets


def _q5_k(data: np.ndarray) -> tuple[np.ndarray, ...]:
    scales, offsets = _scales_of_8_groups(data)
    low = _halves(data[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    high = (data[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None]) & 1
    return (low | (high << 4).view(np.int8)).reshape(-1, 256), scales, -offsets


def _q6_k(data: np.ndarray) -> tuple[np.ndarray, ...]:
    low, high = data[:, :128].reshape(-1, 2, 64), data[:, 128:192].reshape(-1, 2, 1, 32)
    low = np.concatenate([low & 15, low >> 4], axis=2).reshape(-1, 2, 4, 32)
    high = (high >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & 3
    codes = (low | (high << 4)).view(np.int8).reshape(-1, 256) - np.int8(32)
    return codes, _float16(data[:, 208:210]) * data[:, 192:208].view(np.int8).astype(np.float32)


BLOCK_TYPES = {
    "Q4_0": BlockType(32, 18, Layout("int4", 32, scale_dtype="float16"), _q4_0),
    "Q4_1": BlockType(32, 20, Layout("uint4", 32, "minimum", scale_dtype="float16"), _q4_1),
    "Q8_0": BlockType(32, 34, Layout("int8", 32, scale_dtype="float16"), _q8_0),
    "Q4_K": BlockType(256, 144, Layout("uint4", 32, "minimum"), _q4_k),
    "Q5_K": BlockType(256, 176, Layout("int8", 32, "minimum"), _q5_k),
    "Q6_K": BlockType(256, 210, Layout("int8", 16), _q6_k),
}
