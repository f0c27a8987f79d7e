"""What the codes of a quantized weight mean."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

ScaleDtype = Literal["float32", "float16", "bfloat16"]
Arrays = dict[str, jax.Array]
"""By name; see `Layout`."""

# QLoRA's NormalFloat (Dettmers et al. 2023, arXiv 2305.14314, appendix E): quantiles of a normal distribution, zero among them.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334, -0.09105003625154495,
    0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
# bitsandbytes' 4-bit floats, over their largest, 12: sign, two bits of exponent, one of mantissa.
_FP4 = tuple(sign * value for sign in (1, -1) for value in (0, 0.005208333333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25))
# OCP's E2M1 (Open Compute Project, Microscaling Formats Specification 1.0, section 5.3.3).
_E2M1 = tuple(sign * value for sign in (1, -1) for value in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0))
TABLES = {name: np.array(table, np.float32) for name, table in (("nf4", _NF4), ("fp4", _FP4), ("e2m1", _E2M1))}


@dataclass(frozen=True)
class Layout:
    """How a weight [n, k] is quantized; plain values, so that layouts compare and travel.

    Unpacked it is these arrays, by name:
        codes [n, k]: int8 (int4: -8 to 7; uint4 and a table: 0 to 15), or float8_e4m3fn.
        scales [n, k / group]: float32.
        zeros [n, k / group], int16, where `correction` is "zero": an element is (code - zero) * scale.
        minimums [n, k / group], float32, where it is "minimum": an element is code * scale + minimum.
        input_scale [1], float32, where `static` is set: of the activations.

    Attributes:
        code: what a code stands for: itself, or an entry of a table ("nf4", "fp4", "e2m1").
        group: neighbouring columns that share a scale; 0: all of the row's.
        correction: whether elements are moved, see above.
        scale_dtype: in which scales and minimums are kept.
        activations: to what a step's activations are quantized too, where the device multiplies such numbers ("fp8", "int8"); "": never.
        static: activations have one scale, which the checkpoint tells; otherwise each token has its own.
    """

    code: Literal["int4", "uint4", "int8", "nf4", "fp4", "e2m1", "fp8"]
    group: int = 0
    correction: Literal["none", "zero", "minimum"] = "none"
    scale_dtype: ScaleDtype = "float32"
    activations: Literal["", "fp8", "int8"] = ""
    static: bool = False

    @property
    def bits(self) -> int:
        """Of a code."""
        return 8 if self.code in ("int8", "fp8") else 4

    @property
    def largest_code(self) -> float:
        """A bound of the magnitudes that a scale is multiplied with."""
        if self.code in TABLES:
            return float(np.abs(TABLES[self.code]).max())
        return 448.0 if self.code == "fp8" else 2.0**self.bits

    def group_of(self, k: int) -> int:
        """Columns that share a scale in a shard of k columns: where a shard's border cuts groups, smaller ones that it does not cut."""
        return int(np.gcd(self.group, k)) if self.group else k

    def unpacked_shapes(self, n: int, k: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The arrays, before they are packed for a device."""
        groups = n, k // self.group_of(k)
        shapes = {
            "codes": jax.ShapeDtypeStruct((n, k), jnp.float8_e4m3fn if self.code == "fp8" else jnp.int8),
            "scales": jax.ShapeDtypeStruct(groups, jnp.float32),
        }
        if self.correction == "zero":
            shapes["zeros"] = jax.ShapeDtypeStruct(groups, jnp.int16)
        if self.correction == "minimum":
            shapes["minimums"] = jax.ShapeDtypeStruct(groups, jnp.float32)
        if self.static:
            shapes["input_scale"] = jax.ShapeDtypeStruct((1,), jnp.float32)
        return shapes
