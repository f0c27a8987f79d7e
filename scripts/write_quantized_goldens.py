"""Write tests/goldens/quantized.safetensors: small matrices as the formats' own libraries store them, and what these make of them.

Run by hand in a Python 3.11 environment; not part of the tests. It runs on a CPU:

    uv pip install torch transformers gguf safetensors bitsandbytes compressed-tensors setuptools wheel
    uv pip install --no-deps autoawq; BUILD_CUDA_EXT=0 uv pip install --no-deps --no-build-isolation auto-gptq
    python scripts/write_quantized_goldens.py

A case is the tensors `<case>/<name in the checkpoint>` of the module `m`, and `<case>/dequantized` in the dtype of the library.
The metadata of the file has a JSON object for each case: the quantization_config.
"""

import importlib
import json
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from safetensors.torch import save_file  # pyright: ignore[reportMissingImports]

GOLDENS = Path(__file__).parent.parent / "tests" / "goldens" / "quantized.safetensors"
ROWS, COLUMNS = 32, 128
FEW_ROWS, MORE_COLUMNS = 16, 256  # the latter for several groups of 128
Case = tuple[str, dict[str, Any], dict[str, torch.Tensor], torch.Tensor]


def weight(seed: int, rows: int = ROWS, columns: int = COLUMNS) -> torch.Tensor:
    """Float32, with a few large elements, as trained weights have them."""
    random = np.random.default_rng(seed)
    values = random.standard_normal((rows, columns)) * np.where(random.random((rows, columns)) < 0.01, 0.2, 0.03)
    return torch.from_numpy(values.astype(np.float32))


def package_without_init(name: str) -> None:
    """Let submodules of a package be imported whose own __init__ needs another transformers."""
    place = Path(*name.split("."))
    folder = next(Path(path) / place for path in sys.path if (Path(path) / place).is_dir())
    stub = types.ModuleType(name)
    stub.__path__ = [str(folder)]
    sys.modules[name] = stub


def columns_told(k: int) -> str:
    """For the name of a case: how many, where it is not as usual."""
    return "" if k == COLUMNS else f"-of-{k}"


def affine(values: torch.Tensor, bits: int, group: int, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales (rounded to float16) and zero points, float32 [n, groups], of the range of each group."""
    n, k = values.shape
    groups = values.reshape(n, -1, k if group == -1 else group)
    top = 2**bits - 1
    if symmetric:
        scales = groups.abs().amax(2) * 2 / top
        zeros = torch.full_like(scales, (top + 1) / 2)
    else:
        low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
        scales = (high - low) / top
        zeros = torch.round(-low / scales).clamp(0, top)
    return scales.half().float(), zeros


def gptq() -> Iterator[Case]:
    """AutoGPTQ's QuantLinear packs, and multiplies with the identity."""
    package_without_init("auto_gptq")
    for sub in ("auto_gptq.nn_modules", "auto_gptq.nn_modules.qlinear"):
        importlib.import_module(sub)
    QuantLinear = importlib.import_module("auto_gptq.nn_modules.qlinear.qlinear_cuda").QuantLinear
    usual, wide = (ROWS, COLUMNS), (ROWS, MORE_COLUMNS)
    cases = [(4, 128, True, False, usual), (4, 32, False, False, usual), (4, 64, False, True, usual), (4, -1, True, False, usual)]
    cases += [(8, 32, True, False, usual), (8, 64, False, False, usual), (8, -1, False, False, usual), (4, 32, True, True, usual)]
    cases += [(4, 128, True, False, wide), (4, 128, False, True, wide), (8, 128, False, False, wide), (8, 32, False, True, usual)]
    cases += [(4, 64, True, False, usual)]
    for seed, (bits, group, symmetric, reordered, (n, k)) in enumerate(cases):
        values = weight(seed, n, k)
        order = torch.randperm(k, generator=torch.Generator().manual_seed(seed)) if reordered else torch.arange(k)
        scales, zeros = affine(values[:, order], bits, group, symmetric)
        indices = torch.empty(k, dtype=torch.int32)
        indices[order] = torch.arange(k, dtype=torch.int32) // (k if group == -1 else group)
        linear = torch.nn.Linear(k, n, bias=False)
        linear.weight.data = values.half()
        packed = QuantLinear(bits, group, k, n, False, kernel_switch_threshold=0)
        packed.pack(linear, scales.half(), zeros.half(), indices)
        packed.autogptq_cuda_available = False
        dequantized = packed(torch.eye(k, dtype=torch.float16)).T.contiguous()
        tensors = {name: getattr(packed, name) for name in ("qweight", "qzeros", "scales", "g_idx")}
        config = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": symmetric, "desc_act": reordered}
        name = f"gptq-{bits}-{group}{'' if symmetric else '-asym'}{'-desc_act' if reordered else ''}{columns_told(k)}"
        yield name, config, tensors, dequantized
        if name == "gptq-4-32-asym":
            # Version 2 stores zero points as they are: GPTQModel, gptqmodel/utils/model.py, convert_gptq_v1_to_v2_format.
            shifted = packed.qzeros.numpy().view(np.uint32)
            nibbles = (((shifted[:, :, None] >> (4 * np.arange(8, dtype=np.uint32))) & 15) + 1) & 15
            words = (nibbles << (4 * np.arange(8, dtype=np.uint32))).sum(2).astype(np.uint32).view(np.int32)
            yield f"{name}-v2", config | {"checkpoint_format": "gptq_v2"}, tensors | {"qzeros": torch.from_numpy(words)}, dequantized


def awq() -> Iterator[Case]:
    """AutoAWQ's WQLinear_GEMM packs, its dequantize_gemm goes back."""
    package_without_init("awq")
    for sub in ("utils", "modules", "modules.linear"):
        stub = types.ModuleType(f"awq.{sub}")
        stub.__path__ = [str(Path(sys.modules["awq"].__path__[0]) / sub.replace(".", "/"))]
        sys.modules[f"awq.{sub}"] = stub
    dequantize_gemm = importlib.import_module("awq.utils.packing_utils").dequantize_gemm
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    usual, wide = (ROWS, COLUMNS), (FEW_ROWS, MORE_COLUMNS)
    for seed, (group, (n, k)) in enumerate(((32, usual), (64, usual), (128, usual), (128, wide))):
        values = weight(100 + seed, n, k)
        scales, zeros = affine(values, 4, group, symmetric=False)
        codes = torch.round(values.reshape(n, -1, group) / scales[:, :, None] + zeros[:, :, None]).clamp(0, 15).reshape(n, -1)

        def pack(integers: torch.Tensor) -> torch.Tensor:
            words = np.zeros((integers.shape[0], integers.shape[1] // 8), np.uint32)
            for i, place in enumerate(order):
                words |= integers.numpy().astype(np.uint32)[:, place::8] << (4 * i)
            return torch.from_numpy(words.view(np.int32))

        tensors = {"qweight": pack(codes.T), "qzeros": pack(zeros.T), "scales": scales.T.half().contiguous()}
        dequantized = dequantize_gemm(tensors["qweight"], tensors["qzeros"], tensors["scales"], 4, group).T.contiguous()
        yield (
            f"awq-{group}{columns_told(k)}",
            {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"},
            tensors,
            dequantized,
        )


def bitsandbytes() -> Iterator[Case]:
    """bitsandbytes' functions for a CPU, which take rows for whole blocks of 64 when they dequantize: 128 columns."""
    import bitsandbytes.functional as bnb  # pyright: ignore[reportMissingImports]

    for seed, (kind, double) in enumerate((("nf4", False), ("fp4", False), ("nf4", True), ("fp4", True))):
        values = weight(200 + seed)
        packed, state = bnb.quantize_4bit(values, blocksize=64, quant_type=kind, compress_statistics=double)
        tensors = {"weight": packed} | {f"weight.{name}": tensor.contiguous() for name, tensor in state.as_dict(packed=True).items()}
        config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": double}
        yield f"bitsandbytes-{kind}{'-double' if double else ''}", config, tensors, bnb.dequantize_4bit(packed, state)
    values = weight(210).half()
    codes, largest, _ = bnb.int8_vectorwise_quant(values)
    config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    yield "bitsandbytes-int8", config, {"weight": codes, "SCB": largest}, bnb.int8_vectorwise_dequant(codes, largest)


def fp8() -> Iterator[Case]:
    """transformers' Fp8Dequantize; by definition, weight times scale in float32, where it refuses: blocks that do not divide a matrix."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize  # pyright: ignore[reportMissingImports]

    def dequantize(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return Fp8Dequantize(None).convert({"weight": [codes], "weight_scale_inv": [scales]})["weight"]

    def blocks(values: torch.Tensor, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes, a scale a block, and each element's scale."""
        n, k = values.shape
        found = [[values[i : i + rows, j : j + columns].abs().max() / 448 for j in range(0, k, columns)] for i in range(0, n, rows)]
        scales = torch.stack(list(map(torch.stack, found)))
        spread = scales.repeat_interleave(rows, 0)[:n].repeat_interleave(columns, 1)[:, :k]
        return (values / spread).to(torch.float8_e4m3fn), scales, spread

    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    codes, scales, spread = blocks(weight(300, 136, 144), 128, 128)
    yield "fp8-block", config, {"weight": codes, "weight_scale_inv": scales}, codes.float() * spread
    codes, scales, _ = blocks(weight(302, FEW_ROWS), 8, 64)
    tensors = {"weight": codes, "weight_scale_inv": scales}
    yield "fp8-block-whole", config | {"weight_block_size": [8, 64]}, tensors, dequantize(codes, scales)
    values = weight(301)
    scale = values.abs().max() / 448
    codes = (values / scale).to(torch.float8_e4m3fn)
    tensors = {"weight": codes, "weight_scale": scale, "input_scale": torch.tensor(0.02)}
    yield "fp8-static", {"quant_method": "fp8", "activation_scheme": "static"}, tensors, dequantize(codes, scale.reshape(1, 1))
    scales = values.abs().amax(1, keepdim=True) / 448
    codes = (values / scales).to(torch.float8_e4m3fn)
    yield "fbgemm_fp8", {"quant_method": "fbgemm_fp8"}, {"weight": codes, "weight_scale": scales}, dequantize(codes, scales)


def compressed_tensors() -> Iterator[Case]:
    """compressed-tensors' compressors, there and back."""
    from compressed_tensors.compressors import BaseCompressor  # pyright: ignore[reportMissingImports]
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme  # pyright: ignore[reportMissingImports]

    int8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    float8 = int8 | {"type": "float"}
    static = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
    grouped_int = {"type": "int", "symmetric": True, "strategy": "group"}
    cases: list[tuple[str, str, dict[str, Any], dict[str, Any] | None]] = [
        ("w4a16-group", "pack-quantized", {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}, None),
        ("w4a16-asym", "pack-quantized", {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 64}, None),
        ("w4a16-channel", "pack-quantized", {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel"}, None),
        ("w4a16-actorder", "pack-quantized", {
            "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "actorder": "group",
        }, None),
        ("w8a16", "pack-quantized", {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}, None),
        ("w8a16-asym", "pack-quantized", {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "channel"}, None),
        ("w8a8-int8", "int-quantized", {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}, int8),
        ("w8a8-fp8", "float-quantized", {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}, float8),
        ("w8a8-fp8-static", "float-quantized", {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor"}, static),
        ("w4a16-128-of-256", "pack-quantized", {"num_bits": 4, "group_size": 128} | grouped_int, None),
        ("w8a16-128-of-256", "pack-quantized", {"num_bits": 8, "group_size": 128} | grouped_int | {"symmetric": False}, None),
        ("int8-tensor", "int-quantized", {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor"}, int8),
        ("int8-group", "int-quantized", {"num_bits": 8, "group_size": 32} | grouped_int, int8),
        ("int8-group-asym", "int-quantized", {"num_bits": 8, "group_size": 32} | grouped_int | {"symmetric": False}, int8),
        ("fp8-group", "float-quantized", {"num_bits": 8, "group_size": 32} | grouped_int | {"type": "float"}, float8),
        ("fp8-block", "float-quantized", {
            "num_bits": 8, "type": "float", "symmetric": True, "strategy": "block", "block_structure": [8, 64],
        }, float8),
    ]  # fmt: skip
    for seed, (name, form, arguments, activations) in enumerate(cases):
        rows, k = ROWS if seed < 9 else FEW_ROWS, MORE_COLUMNS if name.endswith("-of-256") else COLUMNS
        values = weight(400 + seed, rows, k).bfloat16()
        group, bits = arguments.get("group_size", k), arguments["num_bits"]
        tensors: dict[str, torch.Tensor] = {"weight": values}
        order = torch.randperm(k, generator=torch.Generator().manual_seed(seed)) if "actorder" in arguments else torch.arange(k)
        grouped = values.float()[:, order].reshape(rows, -1, group)
        top = 448 if arguments["type"] == "float" else 2 ** (bits - 1) - 1
        if arguments["symmetric"]:
            scales = grouped.abs().amax(2) / top
            if arguments["strategy"] == "tensor":
                scales = scales.max().reshape(1)
            elif arguments["strategy"] == "block":
                height, width = arguments["block_structure"]
                blocks = values.float().reshape(rows // height, height, k // width, width)
                scales = blocks.abs().amax((1, 3)) / top
        else:
            low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
            scales = (high - low) / (2 * top + 1)
            tensors["weight_zero_point"] = (torch.round(-low / scales) - top - 1).clamp(-top - 1, top).to(torch.int8)
        tensors["weight_scale"] = scales.bfloat16()
        if "actorder" in arguments:
            indices = torch.empty(k, dtype=torch.int32)
            indices[order] = torch.arange(k, dtype=torch.int32) // group
            tensors["weight_g_idx"] = indices
        scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**{k: v for k, v in arguments.items() if k != "actorder"}))
        compressor = BaseCompressor.get_value_from_registry(form)
        plain = {key: tensor for key, tensor in tensors.items() if key != "weight_g_idx"}
        if "actorder" in arguments:  # newer versions have dropped it: their functions pack the sorted columns
            plain["weight"] = values[:, order]
        packed = compressor.compress(plain, scheme)
        dequantized = compressor.decompress(packed, scheme)["weight"]
        if "actorder" in arguments:
            back = torch.argsort(order)
            dequantized = dequantized[:, back].contiguous()
            unsorted = compressor.compress(plain | {"weight": values[:, order]}, scheme)
            codes = unsorted["weight_packed"].numpy().view(np.uint8)
            nibbles = np.stack([codes & 15, codes >> 4], 2).reshape(ROWS, -1)[:, back.numpy()]
            words = np.ascontiguousarray(nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)).view(np.int32)
            packed = packed | {"weight_packed": torch.from_numpy(words.copy()), "weight_g_idx": tensors["weight_g_idx"]}
        if activations and not activations["dynamic"]:
            packed["input_scale"] = torch.tensor([0.03])
        group_config = {"targets": ["Linear"], "weights": arguments, "input_activations": activations}
        config = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group_config}, "ignore": ["lm_head"]}
        yield f"compressed-tensors-{name}", config, packed, dequantized


def mxfp4() -> Iterator[Case]:
    """transformers' dequantization of gpt-oss."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors  # pyright: ignore[reportMissingImports]

    random = np.random.default_rng(500)
    blocks = torch.from_numpy(random.integers(0, 256, (1, ROWS, COLUMNS // 32, 16), np.uint8))
    scales = torch.from_numpy(random.integers(110, 130, (1, ROWS, COLUMNS // 32), np.uint8))
    whole = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)[0]
    dequantized = (whole.T if whole.shape[0] == COLUMNS else whole).contiguous()
    yield "mxfp4", {"quant_method": "mxfp4"}, {"_blocks": blocks[0], "_scales": scales[0]}, dequantized
    packed = {"weight_packed": blocks[0].reshape(ROWS, -1), "weight_scale": scales[0]}
    weights = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "group", "group_size": 32}
    group = {"targets": ["Linear"], "weights": weights}
    config = {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized", "config_groups": {"group_0": group}}
    yield "compressed-tensors-mxfp4", config, packed, dequantized


def main() -> None:
    """Write the file."""
    tensors: dict[str, torch.Tensor] = {}
    configs: dict[str, str] = {}
    methods: list[Callable[[], Iterator[Case]]] = [gptq, awq, bitsandbytes, fp8, compressed_tensors, mxfp4]
    for method in methods:
        for name, config, stored, dequantized in method():
            configs[name] = json.dumps(config)
            tensors |= {f"{name}/{key}": tensor.contiguous().clone() for key, tensor in stored.items()}
            tensors[f"{name}/dequantized"] = dequantized.contiguous().clone()
            print(name, {key: (list(tensor.shape), str(tensor.dtype)) for key, tensor in stored.items()}, dequantized.dtype, flush=True)
    save_file(tensors, GOLDENS, metadata=configs)


if __name__ == "__main__":
    main()
