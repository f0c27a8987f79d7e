"""MXFP4 (Open Compute Project, Microscaling Formats Specification 1.0): E2M1 numbers, 32 of a row with one power of two.

"blocks": `<module>_blocks` uint8 [n, k / 32, 16] and `<module>_scales` uint8 [n, k / 32], as gpt-oss has them. "packed":
`weight_packed` uint8 [n, k / 2] and `weight_scale` uint8 [n, k / 32], as compressed-tensors has them.
"""

import numpy as np

from jaxserve.models.formats.packed_integers import unpack_words
from jaxserve.models.formats.scheme import Scheme, Tensors, Unpacked, cut_groups, divided
from jaxserve.models.parameters import Stored
from jaxserve.pallas_kernels import Layout

_GROUP = 32
_EXPONENTS = ("U8", "F8_E8M0")


def mxfp4_scheme(variant: str) -> Scheme:
    """The scheme of either variant, see the module."""
    return Scheme("mxfp4", Layout("e2m1", _GROUP, scale_dtype="bfloat16"), _GROUP, variant=variant)


class MXFP4Storage:
    """See the module."""

    def tensors(self, scheme: Scheme, module: str, n: int, k: int) -> tuple[Stored, ...]:
        """As in `Storage`."""
        codes, scales = _names(scheme, module)
        groups = divided(k, _GROUP, module, "columns")
        shape = (n, groups, _GROUP // 2) if scheme.variant == "blocks" else (n, k // 2)
        return Stored(codes, shape, ("U8",)), Stored(scales, (n, groups), _EXPONENTS)

    def read(self, scheme: Scheme, tensors: Tensors, module: str, rows: slice, columns: slice) -> Unpacked:
        """As in `Storage`."""
        codes, scales = _names(scheme, module)
        packed = tensors.read(codes, (rows, *(slice(0, size) for size in tensors.shapes[codes][1:])))
        halves = unpack_words(np.ascontiguousarray(packed.reshape(len(packed), -1)), 4)[:, columns]
        exponents = tensors.read(scales, (rows, slice(0, tensors.shapes[scales][1]))).view(np.uint8)
        powers = np.ldexp(np.float32(1), np.minimum(exponents, 254).astype(np.int32) - 127)
        powers[exponents == 255] = np.nan  # as the format has it
        return {"codes": halves.view(np.int8), "scales": cut_groups(powers, columns, scheme)}


def _names(scheme: Scheme, module: str) -> tuple[str, str]:
    return (f"{module}_blocks", f"{module}_scales") if scheme.variant == "blocks" else (f"{module}.weight_packed", f"{module}.weight_scale")
