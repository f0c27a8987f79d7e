"""GPTQ checkpoints (Frantar et al. 2022, arXiv 2210.17323) as AutoGPTQ and GPTQModel write them.

`qweight` int32 [k / (32 / bits), n] packs columns; `qzeros` int32 [groups, n / (32 / bits)] packs rows; `scales` [groups, n]; `g_idx`
int32 [k] tells the group of each column. Version 1 stores each zero point less one.
"""

from collections.abc import Mapping

import numpy as np

from jaxserve.errors import UnsupportedModel, WeightsError
from jaxserve.models.fields import Fields
from jaxserve.models.formats.packed_integers import read_packed, signed
from jaxserve.models.formats.scheme import WORDS, Scheme, Tensors, Unpacked, cut_groups, divided, sorted_columns
from jaxserve.models.parameters import Stored
from jaxserve.pallas_kernels import Layout

GROUPS = (32, 64, 128)
# Other options for some modules: GPTQModel's and AutoRound's, which write AWQ too.
OTHERS_FOR_SOME = {"dynamic": None, "extra_config": None}


def gptq_scheme(fields: Fields) -> Scheme:
    """What a quantization_config of GPTQ says of its matrices.

    Raises:
        UnsupportedModel: an option that no code here serves.
    """
    bits = fields.integer("bits")
    group = fields.integer("group_size", 128, low=-1)
    # GPTQModel has had both names.
    kind = fields.values.get("checkpoint_format") or fields.values.get("format") or "gptq"
    if bits not in (4, 8):
        raise UnsupportedModel(f"{fields.file}: bits {bits} is not supported for GPTQ (4 and 8 are)")
    if group not in (-1, *GROUPS):
        raise UnsupportedModel(f"{fields.file}: group_size {group} is not supported (-1, 32, 64 and 128 are)")
    if kind not in ("gptq", "gptq_v2"):
        raise UnsupportedModel(f"{fields.file}: checkpoint_format {kind!r:.80} is not supported (gptq and gptq_v2 are)")
    refuse(fields, {"format": kind, "pack_dtype": "int32", "is_marlin_format": False, "adapter": None, "rotation": None} | OTHERS_FOR_SOME)
    symmetric = fields.boolean("sym", True)
    layout = Layout("int4" if bits == 4 else "int8", max(group, 0), "none" if symmetric else "zero", scale_dtype="float16")
    # With one group a row the order of columns changes nothing.
    return Scheme("gptq", layout, max(group, 0), ordered=group == -1 or not fields.boolean("desc_act", False), variant=kind)


def refuse(fields: Fields, served: Mapping[str, object]) -> None:
    """Name what a configuration asks for in another way than it is served.

    Args:
        served: by the name of the field, which may be absent, null or empty.

    Raises:
        UnsupportedModel: another value.
    """
    for name, value in served.items():
        if (found := fields.values.get(name)) not in (None, "", [], {}) and found != value:
            raise UnsupportedModel(f"{fields.file}: {name} {found!r:.80} is not supported" + ("" if value is None else f" ({value!r} is)"))


class GPTQStorage:
    """See the module."""

    def tensors(self, scheme: Scheme, module: str, n: int, k: int) -> tuple[Stored, ...]:
        """As in `Storage`."""
        count, groups = 32 // scheme.layout.bits, -(-k // (scheme.group or k))
        return (
            Stored(f"{module}.qweight", (divided(k, count, module, "columns"), n), WORDS),
            Stored(f"{module}.qzeros", (groups, -(-n // count)), WORDS),
            Stored(f"{module}.scales", (groups, n)),
            Stored(f"{module}.g_idx", (k,), WORDS, optional=scheme.ordered),
        )

    def read(self, scheme: Scheme, tensors: Tensors, module: str, rows: slice, columns: slice) -> Unpacked:
        """As in `Storage`."""
        bits = scheme.layout.bits
        groups = slice(0, tensors.shapes[f"{module}.scales"][0])
        codes = read_packed(tensors, f"{module}.qweight", columns, rows, bits, axis=0)
        scales = tensors.read(f"{module}.scales", (groups, rows)).T
        zeros = read_packed(tensors, f"{module}.qzeros", rows, groups, bits, axis=1).T
        if scheme.variant == "gptq":
            zeros = (zeros + np.uint8(1)) & np.uint8(2**bits - 1)
        zeros = zeros.astype(np.int16) - np.int16(2 ** (bits - 1))
        if scheme.layout.correction == "none" and zeros.any():
            raise WeightsError(f"{module}.qzeros are not those of symmetric weights, which quantization_config says they are")
        order = sorted_columns(scheme, tensors, f"{module}.g_idx")
        part: Unpacked = {"codes": signed(codes, bits), "scales": cut_groups(scales, columns, scheme)}
        if order is not None:
            part |= {"codes": part["codes"][:, order], "permutation": order}
        if scheme.layout.correction == "zero":
            part["zeros"] = cut_groups(zeros, columns, scheme)
        return part
