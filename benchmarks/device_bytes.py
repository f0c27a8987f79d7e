"""Bytes of device memory that an element of a matrix takes in each format, scales and all: `python -m benchmarks.device_bytes`.

The arrays are empty matrices, packed as those of a checkpoint are. On a GPU the memory that its allocator has given away is read before
and after; on a CPU, whose allocator tells nothing, the arrays tell the size of their buffers.
"""

import argparse
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from benchmarks.rows import add_row_flags, command_line, make_rows
from jaxserve.models.formats import BLOCK_TYPES, read_quantization
from jaxserve.models.formats.gguf import gguf_scheme
from jaxserve.models.formats.scheme import Scheme
from jaxserve.pallas_kernels import pack


def _compressed(form: str, bits: int, kind: str, size: int) -> dict[str, object]:
    weights = {"num_bits": bits, "type": kind, "symmetric": True, "strategy": "group" if size else "channel", "group_size": size or None}
    group = {"targets": ["Linear"], "weights": {name: value for name, value in weights.items() if value is not None}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}


CONFIGS: Mapping[str, Mapping[str, object]] = {
    "gptq_g128": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "gptq_g128_zeros": {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": False},
    "gptq_g32_zeros": {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False},
    "gptq_8bit_g128": {"quant_method": "gptq", "bits": 8, "group_size": 128},
    "awq_g128": {"quant_method": "awq", "bits": 4, "group_size": 128},
    "fp8_tensor": {"quant_method": "fp8", "activation_scheme": "dynamic"},
    "fp8_blocks": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "w4a16_g128": _compressed("pack-quantized", 4, "int", 128),
    "w8a16": _compressed("pack-quantized", 8, "int", 0),
    "w8a8_int8": _compressed("int-quantized", 8, "int", 0),
    "mxfp4": {"quant_method": "mxfp4"},
}
ON_LOAD = ("fp8", "eetq", "bitsandbytes-nf4", "bitsandbytes-fp4")


def schemes() -> dict[str, Scheme]:
    """Of all formats, by name."""
    module = "model.layers.0.mlp.up_proj"
    found: dict[str, Scheme | None] = {
        name: read_quantization({"quantization_config": config}, None).scheme(module) for name, config in CONFIGS.items()
    }
    found |= {f"on_load_{name.replace('-', '_')}": read_quantization({}, name).scheme(module) for name in ON_LOAD}
    return {name: scheme for name, scheme in found.items() if scheme is not None} | {
        kind.lower(): gguf_scheme(kind) for kind in BLOCK_TYPES
    }


def bytes_an_element(scheme: Scheme, rows: int, columns: int) -> float:
    """Of a matrix [rows, columns] on this process's first device."""
    device, layout = jax.local_devices()[0], scheme.layout

    def make() -> dict[str, jax.Array]:
        return pack({name: jnp.zeros(shape.shape, shape.dtype) for name, shape in layout.unpacked_shapes(rows, columns).items()}, layout)

    compiled = jax.jit(make).lower().compile()
    before = (device.memory_stats() or {}).get("bytes_in_use")
    arrays = jax.block_until_ready(compiled())
    if before is None:
        return sum(array.on_device_size_in_bytes() for array in arrays.values()) / (rows * columns)
    return (device.memory_stats()["bytes_in_use"] - before) / (rows * columns)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rows", type=int, default=28672)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--only", nargs="*", default=[], help="names of formats")
    add_row_flags(parser)
    arguments = parser.parse_args()
    rows = make_rows(arguments, jax.local_devices()[0].device_kind)
    command, count = command_line("benchmarks.device_bytes"), arguments.rows * arguments.columns
    rows.add(
        "bytes_bfloat16", jnp.zeros((arguments.rows, arguments.columns), jnp.bfloat16).on_device_size_in_bytes() / count, "bytes", command
    )
    for name, scheme in schemes().items():
        if not arguments.only or name in arguments.only:
            rows.add(f"bytes_{name}", bytes_an_element(scheme, arguments.rows, arguments.columns), "bytes", command)
            print(f"{name:24s} {rows.added[-1]['value']}", flush=True)
    rows.show()


if __name__ == "__main__":
    main()
