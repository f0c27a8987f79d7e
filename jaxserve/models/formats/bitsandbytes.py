"""Checkpoints that bitsandbytes has quantized: nf4 and fp4 in blocks of a flat matrix, with scales that may be quantized again; int8.

4 bits: `weight` uint8 [n * k / 2, 1], of whose bytes the high half comes first; `weight.absmax`, `weight.quant_map` and
`weight.quant_state.bitsandbytes__<kind>`, the bytes of a JSON object. 8 bits: `weight` int8 [n, k] and `SCB` [n], a row's largest element.
"""

import json
from typing import Any

import numpy as np

from jaxserve.errors import UnsupportedModel, WeightsError
from jaxserve.models.fields import Fields
from jaxserve.models.formats.packed_integers import unpack_words
from jaxserve.models.formats.scheme import Scheme, Tensors, Unpacked
from jaxserve.models.parameters import Stored
from jaxserve.pallas_kernels import TABLES, Layout

_BLOCK, _NESTED_BLOCK = 64, 256
_BYTES = ("U8",)
_OFTEN_ABSENT = ("quant_type", "nested_blocksize")
_LARGEST_OFFSET = 1e30


def bitsandbytes_scheme(fields: Fields) -> Scheme:
    """What a quantization_config of bitsandbytes says of its matrices.

    Raises:
        UnsupportedModel: an option that no code here serves.
    """
    four, eight = fields.boolean("load_in_4bit", False), fields.boolean("load_in_8bit", False)
    if four == eight:
        raise UnsupportedModel(
            f"{fields.file}: {'both' if four else 'neither'} load_in_4bit {'and' if four else 'nor'} load_in_8bit is true"
        )
    if eight:
        return Scheme("bitsandbytes-int8", Layout("int8"))
    kind, storage = fields.values.get("bnb_4bit_quant_type") or "fp4", fields.values.get("bnb_4bit_quant_storage") or "uint8"
    if kind not in ("nf4", "fp4"):
        raise UnsupportedModel(f"{fields.file}: bnb_4bit_quant_type {kind!r:.80} is not supported (nf4 and fp4 are)")
    if storage != "uint8":
        raise UnsupportedModel(f"{fields.file}: bnb_4bit_quant_storage {storage!r:.80} is not supported (uint8 is)")
    double = fields.boolean("bnb_4bit_use_double_quant", False)
    return Scheme("bitsandbytes", Layout(kind, _BLOCK), _BLOCK, variant="double" if double else "")


class BitsAndBytesStorage:
    """4 bits, see the module."""

    def tensors(self, scheme: Scheme, module: str, n: int, k: int) -> tuple[Stored, ...]:
        """As in `Storage`."""
        name, blocks = f"{module}.weight", -(-n * k // _BLOCK)
        stored = [
            Stored(name, (-(-n * k // 2), 1), _BYTES),
            Stored(f"{name}.absmax", (blocks,), _BYTES if scheme.variant else ("F32",)),
            Stored(f"{name}.quant_map", (16,), ("F32",)),
            Stored(f"{name}.quant_state.bitsandbytes__{scheme.layout.code}", None, _BYTES),
        ]
        if scheme.variant:
            stored += [
                Stored(f"{name}.nested_absmax", (-(-blocks // _NESTED_BLOCK),), ("F32",)),
                Stored(f"{name}.nested_quant_map", (256,), ("F32",)),
            ]
        return tuple(stored)

    def read(self, scheme: Scheme, tensors: Tensors, module: str, rows: slice, columns: slice) -> Unpacked:
        """As in `Storage`."""
        name = f"{module}.weight"
        state = _state(tensors, _state_name(scheme, module))
        k = int(state["shape"][1])
        table = tensors.read(f"{name}.quant_map", (slice(0, 16),))
        if not np.array_equal(table, TABLES[scheme.layout.code]):
            raise WeightsError(f"{name}.quant_map is not that of {scheme.layout.code}")
        first, last = rows.start * k, rows.stop * k
        packed = tensors.read(name, (slice(first // 2, -(-last // 2)), slice(0, 1))).reshape(1, -1)
        # Its bytes have their halves the other way round.
        flat = unpack_words((packed >> 4) | (packed << 4), 4)[0, first % 2 :][: last - first]
        starts = np.arange(columns.start, columns.stop, scheme.layout.group_of(columns.stop - columns.start))
        blocks = (np.arange(rows.start, rows.stop)[:, None] * k + starts[None, :]) // _BLOCK
        low, high = int(blocks.min()), int(blocks.max()) + 1
        scales = tensors.read(f"{name}.absmax", (slice(low, high),))
        if scheme.variant:
            outer = tensors.read(f"{name}.nested_absmax", (slice(0, tensors.shapes[f"{name}.nested_absmax"][0]),))
            inner = tensors.read(f"{name}.nested_quant_map", (slice(0, 256),))
            scales = inner[scales] * outer[np.arange(low, high) // _NESTED_BLOCK] + np.float32(state["nested_offset"])
        return {"codes": flat.reshape(-1, k)[:, columns].view(np.int8), "scales": scales[blocks - low]}


def check_state(scheme: Scheme, tensors: Tensors, module: str, n: int, k: int) -> None:
    """Compare the JSON object that goes with a matrix with the configuration.

    Raises:
        WeightsError: it is damaged, or tells of another shape, other blocks or another table.
    """
    name = _state_name(scheme, module)
    state = _state(tensors, name)
    wanted: dict[str, Any] = {"shape": [n, k], "blocksize": _BLOCK, "quant_type": scheme.layout.code}
    if scheme.variant:
        wanted["nested_blocksize"] = _NESTED_BLOCK
        offset = state.get("nested_offset")
        if isinstance(offset, bool) or not isinstance(offset, int | float) or not abs(offset) < _LARGEST_OFFSET:
            raise WeightsError(f"{name}: nested_offset must be a number. Found: {offset!r:.80}")
    for key, value in wanted.items():
        if (found := state.get(key, value if key in _OFTEN_ABSENT else None)) != value:
            raise WeightsError(f"{name}: {key} is {found!r:.80}, not {value!r}")


def _state_name(scheme: Scheme, module: str) -> str:
    return f"{module}.weight.quant_state.bitsandbytes__{scheme.layout.code}"


def _state(tensors: Tensors, name: str) -> dict[str, Any]:
    """The JSON object that goes with a matrix."""
    data = tensors.read(name, tuple(slice(0, size) for size in tensors.shapes[name]))
    try:
        state = json.loads(bytes(data.reshape(-1)))
    except (ValueError, RecursionError):
        state = None
    if not isinstance(state, dict):
        raise WeightsError(f"{name} is damaged")
    return state


def check_weight_format(scheme: Scheme, tensors: Tensors, module: str, n: int, k: int) -> None:
    """Refuse weights of 8 bits that lie in the order of a GPU's tiles.

    Raises:
        WeightsError: they do.
    """
    del scheme, n, k
    name = f"{module}.weight_format"
    if name in tensors.shapes and (kind := int(tensors.read(name, tuple(slice(0, 1) for _ in tensors.shapes[name])).reshape(()))) != 0:
        raise WeightsError(f"{name} is {kind}, which is not supported (0, row after row, is)")


class BitsAndBytesInt8Storage:
    """8 bits, see the module."""

    def tensors(self, scheme: Scheme, module: str, n: int, k: int) -> tuple[Stored, ...]:
        """As in `Storage`."""
        del scheme
        formats = Stored(f"{module}.weight_format", (), (*_BYTES, "I8", "I32", "I64"), optional=True)
        return Stored(f"{module}.weight", (n, k), ("I8",)), Stored(f"{module}.SCB", (n,)), formats

    def read(self, scheme: Scheme, tensors: Tensors, module: str, rows: slice, columns: slice) -> Unpacked:
        """As in `Storage`."""
        del scheme
        largest = tensors.read(f"{module}.SCB", (rows,)).astype(np.float32)
        return {"codes": tensors.read(f"{module}.weight", (rows, columns)), "scales": largest[:, None] / np.float32(127)}
