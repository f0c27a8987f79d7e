"""In which form a quantized weight stays on a device: packed once, as it is loaded, and put together again while a product is traced."""

import functools

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels.gpu import Gpu, local_gpu
from jaxserve.pallas_kernels.quantized_matmul.layout import TABLES, Arrays, Layout
from jaxserve.pallas_kernels.quantized_matmul.plain import PlainWeight, pack_plain
from jaxserve.pallas_kernels.quantized_matmul.tiled import TiledWeight, pack_tiles, takes_tiles
from jaxserve.pallas_kernels.quantized_matmul.weights import EightBitWeight, FourBitWeight, pack_four_bit

Weight = FourBitWeight | EightBitWeight | PlainWeight | TiledWeight


def pack(unpacked: Arrays, layout: Layout) -> Arrays:
    """Bring the arrays of a weight [n, k] that `Layout` describes into the form for the device that is traced for."""
    codes, zeros = unpacked["codes"], unpacked.get("zeros")
    packed = dict(unpacked)
    for name in packed.keys() & {"scales", "minimums"}:
        packed[name] = packed[name].astype(layout.scale_dtype)
    match _form(layout, codes.shape[1]):
        case "four":
            # Its codes and zero points count from the lowest code.
            weight = pack_four_bit(
                codes + jnp.int8(8 if layout.code == "int4" else 0),
                packed["scales"],
                None if zeros is None else zeros + jnp.int16(8),
                packed.get("minimums"),
                values=_table(layout),
            )
            arrays = {"codes": weight.codes, "scales": weight.scales, "zeros": weight.zeros, "minimums": weight.minima}
            return {name: x for name, x in arrays.items() if x is not None}
        case "eight":
            return packed | {name: packed[name].T for name in packed.keys() & {"scales", "zeros"}}
        case _ if local_gpu() is None and takes_tiles(layout, *codes.shape):
            return pack_tiles(packed, layout)
        case _:
            return packed | {"codes": pack_plain(codes, layout)}


def weight_of(arrays: Arrays, layout: Layout, k: int) -> Weight:
    """The weight of k columns whose arrays `pack` made, for the same device."""
    codes, scales, zeros, minimums = (arrays.get(name) for name in ("codes", "scales", "zeros", "minimums"))
    assert codes is not None and scales is not None
    match _form(layout, k):
        case "four":
            return FourBitWeight(codes, scales, zeros, minimums, _table(layout))
        case "eight":
            x_scale = arrays["input_scale"].reshape(()) if layout.static else None
            return EightBitWeight(codes, scales, zeros, x_scale, quantized_activations=bool(layout.activations))
        case _ if codes.ndim == 4:
            return TiledWeight(codes, scales, zeros, minimums, layout)
        case _:
            return PlainWeight(codes, scales, zeros, minimums, layout)


def packed_shapes(layout: Layout, n: int, k: int) -> dict[str, jax.ShapeDtypeStruct]:
    """What `pack` makes of a weight [n, k] for the device that is traced for."""
    return _packed_shapes(layout, n, k, local_gpu())


@functools.cache
def _packed_shapes(layout: Layout, n: int, k: int, gpu: Gpu | None) -> dict[str, jax.ShapeDtypeStruct]:
    del gpu  # `pack` asks again
    return jax.eval_shape(lambda arrays: pack(arrays, layout), layout.unpacked_shapes(n, k))


def _form(layout: Layout, k: int) -> str:
    """Which of the weights takes it."""
    group = layout.group_of(k)
    if local_gpu() is None or not (group in (32, 64) or group % 128 == 0 or (layout.bits == 8 and group == k)):
        return "plain"
    if layout.bits == 4:
        return "four"
    return "plain" if layout.correction == "minimum" else "eight"


def _table(layout: Layout) -> tuple[float, ...] | None:
    if layout.code == "uint4":
        return tuple(map(float, range(16)))
    return tuple(TABLES[layout.code].tolist()) if layout.code in TABLES else None
