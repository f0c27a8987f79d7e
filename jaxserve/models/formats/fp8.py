"""fp8 checkpoints: weights as float8_e4m3fn [n, k], with a scale for all of them, one a row, or one a block.

Of Hugging Face's fine-grained fp8 (`weight_scale_inv`), of vLLM's and llm-compressor's (`weight_scale`, `input_scale`), of FBGEMM's.
"""

import math
from dataclasses import replace

import numpy as np

from jaxserve.errors import UnsupportedModel, WeightsError
from jaxserve.models.fields import Fields
from jaxserve.models.formats.scheme import Scheme, Tensors, Unpacked
from jaxserve.models.parameters import Stored
from jaxserve.pallas_kernels import Layout

_LARGEST_BLOCK = 1024


def fp8_scheme(fields: Fields) -> Scheme:
    """What a quantization_config of method fp8 says of its matrices.

    Raises:
        UnsupportedModel: an option that no code here serves.
    """
    activations = fields.values.get("activation_scheme") or "dynamic"
    kind = str(fields.values.get("fmt") or "e4m3")
    if activations not in ("dynamic", "static"):
        raise UnsupportedModel(f"{fields.file}: activation_scheme {activations!r:.80} is not supported (dynamic and static are)")
    if kind not in ("e4m3", "float8_e4m3fn"):
        raise UnsupportedModel(f"{fields.file}: fmt {kind:.80} is not supported (e4m3 is)")
    block = fields.values.get("weight_block_size")
    if block is None:
        return stored_fp8("tensor", static=activations == "static")
    if not isinstance(block, list) or len(block) != 2 or not all(isinstance(size, int) and 0 < size <= _LARGEST_BLOCK for size in block):
        raise UnsupportedModel(f"{fields.file}: weight_block_size must be two sizes up to {_LARGEST_BLOCK}. Given: {block!r:.80}")
    return stored_fp8("block", static=activations == "static", block=(block[0], block[1]), scale_name="weight_scale_inv")


def stored_fp8(strategy: str, *, static: bool, block: tuple[int, int] = (1, 0), scale_name: str = "weight_scale") -> Scheme:
    """A scheme of weights that are fp8 in the checkpoint.

    Args:
        strategy: "tensor", "channel" or "block".
        static: the checkpoint has a scale for activations.
        block: rows and columns that share a scale, for the last.
        scale_name: of the scales' tensor.
    """
    layout = Layout("fp8", block[1], activations="fp8", static=static)
    return Scheme("fp8", layout, block[1], {"tensor": 0, "channel": 1}.get(strategy, block[0]), variant=scale_name)


class FP8Storage:
    """See the module."""

    def tensors(self, scheme: Scheme, module: str, n: int, k: int) -> tuple[Stored, ...]:
        """As in `Storage`. Where config.json tells of one scale a tensor, `check_scales` looks at their shape."""
        scales, others = scale_tensors(scheme, module, n, k)
        scales = scales if scheme.group_rows else replace(scales, shape=None)
        return Stored(f"{module}.weight", (n, k), ("F8_E4M3",)), scales, others

    def read(self, scheme: Scheme, tensors: Tensors, module: str, rows: slice, columns: slice) -> Unpacked:
        """As in `Storage`."""
        return {"codes": tensors.read(f"{module}.weight", (rows, columns)), **read_scales(scheme, tensors, module, rows, columns)}


def check_scales(scheme: Scheme, tensors: Tensors, module: str, n: int, k: int) -> None:
    """Method "fp8" does not say whether there is one scale or one a row: the checkpoint must have either.

    Raises:
        WeightsError: it has another number of them.
    """
    del k
    name = f"{module}.{scheme.variant}"
    if not scheme.group_rows and math.prod(shape := tensors.shapes[name]) != 1 and shape not in ((n,), (n, 1)):
        raise WeightsError(f"{name} is {list(shape)}, neither a single number nor {[n, 1]}")


def scale_tensors(scheme: Scheme, module: str, n: int, k: int) -> tuple[Stored, ...]:
    """The scales of a weight [n, k], and that of its activations, where there is one."""
    shape = (-(-n // scheme.group_rows), -(-k // (scheme.group or k))) if scheme.group_rows else ()
    scales = Stored(f"{module}.{scheme.variant}", shape)
    return (scales, Stored(f"{module}.input_scale", (), optional=not scheme.layout.static))


def read_scales(scheme: Scheme, tensors: Tensors, module: str, rows: slice, columns: slice) -> Unpacked:
    """The same for a part of the weight, by the names of `Layout`."""
    name = f"{module}.{scheme.variant}"
    scales = tensors.read(name, tuple(slice(0, size) for size in tensors.shapes[name])).astype(np.float32)
    height, k = rows.stop - rows.start, columns.stop - columns.start
    if scheme.group_rows:
        starts = np.arange(columns.start, columns.stop, scheme.layout.group_of(k))
        groups = starts // scheme.group if scheme.group else np.zeros(1, np.int64)
        part: Unpacked = {"scales": scales[np.arange(rows.start, rows.stop) // scheme.group_rows][:, groups]}
    elif scales.size == 1:
        part = {"scales": np.full((height, 1), scales.reshape(-1)[0], np.float32)}
    else:
        part = {"scales": scales.reshape(-1, 1)[rows]}
    if scheme.layout.static:
        name = f"{module}.input_scale"
        part["input_scale"] = tensors.read(name, tuple(slice(0, 1) for _ in tensors.shapes[name])).reshape(1).astype(np.float32)
    return part
