"""Reading the tensors of a GGUF model under their Hugging Face names, dequantized as they are asked for, or as blocks."""

import math
import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jaxserve.errors import WeightsError
from jaxserve.gguf_header import GGUFTensor
from jaxserve.models.formats import BLOCK_TYPES, BLOCKS, GGUFTypes
from jaxserve.weights.gguf_config import config_of_gguf
from jaxserve.weights.gguf_parts import read_gguf

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_DIVISORS = "rope_freqs.weight"
_CHUNK_ELEMENTS = 1 << 20


class GGUFCheckpoint:
    """The tensors and the configuration of one file, or of several (`gguf_parts`).

    Attributes:
        shapes: by Hugging Face name.
        config, generation_config: what its metadata says, see `config_of_gguf`.

    Raises:
        WeightsError: no GGUF file, a damaged one, or a quantization type that the `gguf` package cannot undo.
        UnsupportedModel: see `config_of_gguf`.
    """

    def __init__(self, path: Path):
        self.path = path
        self.header = read_gguf(path)
        self._tensors = {_hf_name(name): tensor for name, tensor in self.header.tensors.items() if name != _ROPE_DIVISORS}
        if len(self._tensors) + (_ROPE_DIVISORS in self.header.tensors) != len(self.header.tensors):
            raise WeightsError(f"{path} is damaged: it has a tensor under two names")
        self._check_tensors()
        in_file_order = sorted(self._tensors.items(), key=lambda item: (item[1].file, item[1].offset))
        self.shapes: Mapping[str, tuple[int, ...]] = {name: tensor.shape for name, tensor in in_file_order}
        self.dtypes: Mapping[str, str] = dict.fromkeys(self.shapes, "F32")  # which all become
        divisors = self.header.tensors.get(_ROPE_DIVISORS)
        rope_divisors = None if divisors is None else self._rows(divisors, 0, 1)[0].tolist()
        self.config, self.generation_config = config_of_gguf(self.header, rope_divisors)
        kept = {name.removesuffix(".weight"): kind for name, kind in self._kinds() if kind in BLOCK_TYPES}
        if kept:
            self.config["quantization_config"] = GGUFTypes(kept)
        # llama.cpp's converter reorders these, because its graph of Llama turns neighbouring elements of a head.
        self._permuted = (".q_proj.", ".k_proj.") if self.header.metadata["general.architecture"] == "llama" else ()

    @property
    def dequantized(self) -> list[str]:
        """Types of matrices that do not stay quantized."""
        return sorted({kind for _, kind in self._kinds() if kind not in BLOCK_TYPES and kind not in ("F64", "F32", "F16", "BF16")})

    def _kinds(self) -> Iterator[tuple[str, str]]:
        """(name, quantization type) of each matrix."""
        from gguf import GGMLQuantizationType

        return ((name, GGMLQuantizationType(tensor.type).name) for name, tensor in self._tensors.items() if len(tensor.shape) == 2)

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Part of a tensor in float32, or of its bytes (`formats.BLOCKS`)."""
        blocks = name.endswith(BLOCKS)
        name = name.removesuffix(BLOCKS)
        tensor, rows = self._tensors[name], index[0]
        # Of some matrices whole heads: within one, rows lie in another order.
        unit = self.config["head_dim"] if any(infix in name for infix in self._permuted) else 1
        rows = slice(rows.start // unit * unit, -(-rows.stop // unit) * unit)
        if blocks:
            part = self._bytes(tensor, rows.start, rows.stop)[:, index[1]]
        elif len(tensor.shape) == 1:
            part = self._rows(tensor, 0, 1)[0, rows]
        else:
            part = self._rows(tensor, rows.start, rows.stop)[:, index[1]]
        return part if unit == 1 else _unpermute(part, unit)[index[0].start - rows.start : index[0].stop - rows.start]

    def _rows(self, tensor: GGUFTensor, start: int, stop: int) -> np.ndarray:
        """Rows of a tensor as float32 [stop - start, K]; a vector is one row. In chunks on all cores, as numpy lets go of the GIL."""
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        columns = tensor.shape[-1]
        rows = np.empty((stop - start, columns), np.float32)
        step = max(_CHUNK_ELEMENTS // columns, 1)

        def fill(first: int) -> None:
            count = min(step, len(rows) - first)
            packed = self._bytes(tensor, start + first, start + first + count)
            rows[first : first + count] = dequantize(packed, GGMLQuantizationType(tensor.type)).reshape(count, columns)

        try:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(fill, range(0, len(rows), step)))
        except (OSError, ValueError, NotImplementedError) as error:
            raise WeightsError(f"{tensor.file} cannot be read: {error}") from None
        return rows

    def _bytes(self, tensor: GGUFTensor, start: int, stop: int) -> np.ndarray:
        """Rows of a tensor as they are, uint8 [stop - start, bytes]."""
        row_bytes = _num_bytes(tensor.type, tensor.shape[-1])
        try:
            data = np.fromfile(tensor.file, np.uint8, (stop - start) * row_bytes, offset=tensor.offset + start * row_bytes)
            return data.reshape(stop - start, row_bytes)
        except (OSError, ValueError) as error:
            raise WeightsError(f"{tensor.file} cannot be read: {error}") from None

    def _check_tensors(self) -> None:
        """Every tensor must lie within its file, so that no size read from it is believed before, and be of a type that can be read."""
        sizes = {file: file.stat().st_size for file in {tensor.file for tensor in self.header.tensors.values()}}
        for name, tensor in self.header.tensors.items():
            if 0 in tensor.shape:
                raise WeightsError(f"{tensor.file} is damaged: {name} is empty")
            _check_type(name, tensor)
            if tensor.offset + math.prod(tensor.shape[:-1]) * _num_bytes(tensor.type, tensor.shape[-1]) > sizes[tensor.file]:
                raise WeightsError(f"{tensor.file} is truncated or damaged: {name} goes beyond its end")


def _num_bytes(type_number: int, columns: int) -> int:
    """Bytes of a row of a type that is known."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(type_number)]
    return columns // block * block_bytes


def _check_type(name: str, tensor: GGUFTensor) -> None:
    """Whether rows of a tensor can be made of its type's blocks, and dequantized."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        kind = GGMLQuantizationType(tensor.type)
    except ValueError:
        raise WeightsError(f"GGUF: {name}: unknown quantization type {tensor.type}") from None
    try:
        _zeros(kind)
    except NotImplementedError:
        raise WeightsError(f"GGUF: {name}: quantization type {kind.name} is not supported") from None
    if tensor.shape[-1] % (block := GGML_QUANT_SIZES[kind][0]):
        raise WeightsError(f"GGUF: {name}: rows of {tensor.shape[-1]} are not made of {kind.name} blocks of {block}")


@cache
def _zeros(kind: "GGMLQuantizationType") -> np.ndarray:
    """One block; NotImplementedError where the `gguf` package does not dequantize the type."""
    from gguf import GGML_QUANT_SIZES
    from gguf.quants import dequantize

    return dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)


def _hf_name(name: str) -> str:
    """Hugging Face's name of a tensor; one that is not known keeps its own and is refused later."""
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name):
        block, part, kind = match.groups()
        return f"model.layers.{block}.{_INNER[part]}.{kind}" if part in _INNER else name
    part, _, kind = name.rpartition(".")
    return f"{_OUTER[part]}.{kind}" if part in _OUTER else name


def _unpermute(part: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows (0, D/2, 1, D/2 + 1, ...) of each head back to (0, 1, ... D - 1)."""
    return part.reshape(-1, head_dim // 2, 2, *part.shape[1:]).swapaxes(1, 2).reshape(part.shape)
