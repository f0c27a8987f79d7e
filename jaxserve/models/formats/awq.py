"""AWQ checkpoints (Lin et al. 2023, arXiv 2306.00978) as AutoAWQ writes them, in its GEMM packing.

`qweight` int32 [k, n / 8] packs rows, in each word in the order 0, 2, 4, 6, 1, 3, 5, 7; `qzeros` int32 [groups, n / 8] likewise;
`scales` [groups, n].
"""

import numpy as np

from jaxserve.errors import UnsupportedModel
from jaxserve.models.fields import Fields
from jaxserve.models.formats.gptq import GROUPS, OTHERS_FOR_SOME, refuse
from jaxserve.models.formats.packed_integers import read_packed, signed
from jaxserve.models.formats.scheme import WORDS, Scheme, Tensors, Unpacked, cut_groups, divided
from jaxserve.models.parameters import Stored
from jaxserve.pallas_kernels import Layout

_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


def awq_scheme(fields: Fields) -> Scheme:
    """What a quantization_config of AWQ says of its matrices.

    Raises:
        UnsupportedModel: an option that no code here serves.
    """
    bits = fields.integer("bits", fields.integer("w_bit", 4))
    group = fields.integer("group_size", fields.integer("q_group_size", 128, low=-1), low=-1)
    version = str(fields.values.get("version") or "gemm").lower()
    if bits != 4:
        raise UnsupportedModel(f"{fields.file}: bits {bits} is not supported for AWQ (4 is)")
    if group not in (-1, *GROUPS):
        raise UnsupportedModel(f"{fields.file}: group_size {group} is not supported (-1, 32, 64 and 128 are)")
    if version != "gemm":
        raise UnsupportedModel(f"{fields.file}: version {version:.80} is not supported for AWQ (gemm is)")
    served = {"checkpoint_format": "gemm", "format": "gemm", "pack_dtype": "int32", "zero_point": True, "w_bit": 4, "q_group_size": group}
    refuse(fields, served | OTHERS_FOR_SOME)
    if fields.values.get("backend") == "llm-awq":  # which packs in its own way
        raise UnsupportedModel(f"{fields.file}: backend 'llm-awq' is not supported")
    return Scheme("awq", Layout("int4", max(group, 0), "zero", scale_dtype="float16"), max(group, 0))


class AWQStorage:
    """See the module."""

    def tensors(self, scheme: Scheme, module: str, n: int, k: int) -> tuple[Stored, ...]:
        """As in `Storage`."""
        groups, words = -(-k // (scheme.group or k)), divided(n, 8, module, "rows")
        return (
            Stored(f"{module}.qweight", (k, words), WORDS),
            Stored(f"{module}.qzeros", (groups, words), WORDS),
            Stored(f"{module}.scales", (groups, n)),
        )

    def read(self, scheme: Scheme, tensors: Tensors, module: str, rows: slice, columns: slice) -> Unpacked:
        """As in `Storage`."""
        groups = slice(0, tensors.shapes[f"{module}.scales"][0])
        codes = read_packed(tensors, f"{module}.qweight", rows, columns, 4, axis=1, order=_ORDER).T
        scales = tensors.read(f"{module}.scales", (groups, rows)).T
        zeros = read_packed(tensors, f"{module}.qzeros", rows, groups, 4, axis=1, order=_ORDER).T
        return {
            "codes": signed(np.ascontiguousarray(codes), 4),
            "scales": cut_groups(scales, columns, scheme),
            "zeros": cut_groups(zeros.astype(np.int16) - np.int16(8), columns, scheme),
        }
