"""Quantized checkpoints: dequantized weights to the bit as the formats' own libraries make them (scripts/write_quantized_goldens.py)."""

import json
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from safetensors import safe_open
from tiny_gguf import random_blocks

from jaxserve.errors import StartupError, UnsupportedModel, WeightsError
from jaxserve.models.formats import BLOCKS, Quantization, QuantizedMatrix, read_quantization
from jaxserve.models.formats.gguf import gguf_scheme
from jaxserve.models.formats.on_load import SCHEMES
from jaxserve.models.formats.on_load import quantize as quantize_on_load
from jaxserve.models.formats.quantization import Rule
from jaxserve.models.parameters import Axis, Source
from jaxserve.pallas_kernels import Layout, pack, weight_of
from jaxserve.weights.checkpoint import check_tensors
from jaxserve.weights.safetensors_folder import SafetensorsCheckpoint

GOLDENS = Path(__file__).parent / "goldens" / "quantized.safetensors"
with safe_open(GOLDENS, "numpy") as file:
    CONFIGS: dict[str, dict[str, Any]] = {name: json.loads(text) for name, text in file.metadata().items()}
MODULE = "model.layers.0.mlp.down_proj"


class Case:
    """One case of the goldens as the checkpoint of one module."""

    whole = SafetensorsCheckpoint(GOLDENS.parent)

    def __init__(self, name: str, changed: dict[str, np.ndarray] | None = None):
        prefix = f"{name}/"
        self.names = {_place(key.removeprefix(prefix)): key for key in self.whole.shapes if key.startswith(prefix)}
        self.dequantized = self.whole_of(self.names.pop(_place("dequantized")))
        self.changed = {_place(key): values for key, values in (changed or {}).items()}
        self.shapes = {place: self.whole.shapes[key] for place, key in self.names.items()}
        self.shapes |= {place: values.shape for place, values in self.changed.items()}
        self.dtypes = {place: self.whole.dtypes[key] for place, key in self.names.items()}
        quantization = read_quantization({"quantization_config": CONFIGS[name]}, None)
        has_halves = name.startswith(("gptq", "awq"))
        self.quantization = quantization.with_scales("float16" if has_halves else "float32")
        scheme = self.quantization.scheme(MODULE)
        assert scheme is not None
        self.scheme = scheme

    def whole_of(self, key: str) -> np.ndarray:
        return self.whole.read(key, tuple(slice(0, size) for size in self.whole.shapes[key]))

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        return self.changed[name][index] if name in self.changed else self.whole.read(self.names[name], index)

    def matrix(self, rows: int = 0, columns: int = 0) -> QuantizedMatrix:
        """Its axes cut into so many units; 0: not."""
        n, k = self.dequantized.shape
        return QuantizedMatrix((Source(f"{MODULE}.weight", (Axis("outputs", n, rows), Axis("inputs", k, columns))),), self.scheme)


def _place(key: str) -> str:
    return MODULE + key if key.startswith("_") else f"{MODULE}.{key}"


def dequantized(matrix: QuantizedMatrix, checkpoint: Any, shard: int = 0, shards: int = 1) -> tuple[np.ndarray, np.ndarray | None]:
    """A shard in float32 on the way that loading takes, and the permutation of its columns."""
    unpacked = matrix.read(checkpoint, shard, shards)
    permutation = unpacked.pop("permutation", None)
    arrays = {name: jnp.asarray(values) for name, values in unpacked.items()}
    k = unpacked["codes"].shape[1]
    layout = matrix.scheme.layout
    return np.asarray(weight_of(pack(arrays, layout), layout, k).dequantize(jnp.float32)), permutation


def unsorted(columns: np.ndarray, permutation: np.ndarray | None) -> np.ndarray:
    """Columns in the order of the model."""
    if permutation is None:
        return columns
    back = np.empty_like(columns)
    back[:, permutation] = columns
    return back


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_are_those_of_the_library_to_the_bit(name: str) -> None:
    """As a whole, by rows on 4 devices, by columns on 4; the latter cut groups of 64 and more."""
    case = Case(name)
    expected, (n, k) = case.dequantized, case.dequantized.shape
    check_tensors([*case.matrix().parts().values()], case)
    whole = unsorted(*dequantized(case.matrix(), case))
    by_rows = np.concatenate([unsorted(*dequantized(case.matrix(rows=4), case, shard, 4)) for shard in range(4)])
    parts = [dequantized(case.matrix(columns=4), case, shard, 4) for shard in range(4)]
    orders = [permutation for _, permutation in parts if permutation is not None]
    by_columns = unsorted(np.concatenate([part for part, _ in parts], axis=1), np.concatenate(orders) if orders else None)
    for found in (whole, by_rows, by_columns):
        if name == "bitsandbytes-int8":  # which divides by 127 after it has multiplied
            np.testing.assert_allclose(found, expected, rtol=2e-7, atol=0)
        else:
            np.testing.assert_array_equal(found.astype(expected.dtype).view(np.uint8), expected.view(np.uint8))
    assert np.unique(expected).size > 8 and expected.shape == (n, k)


def test_awq_with_a_group_a_row_is_that_of_128_where_rows_are_as_long() -> None:
    case = Case("awq-128")
    (scheme,) = read_quantization({"quantization_config": CONFIGS["awq-128"] | {"group_size": -1}}, None).schemes
    matrix = QuantizedMatrix(case.matrix().sources, scheme)
    check_tensors([*matrix.parts().values()], case)
    np.testing.assert_array_equal(dequantized(matrix, case)[0].astype(np.float16), case.dequantized)


class Arrays:
    """A checkpoint of one module in arrays."""

    def __init__(self, **arrays: np.ndarray):
        self.arrays = {f"{MODULE}.{name}": array for name, array in arrays.items()}
        self.shapes = {name: array.shape for name, array in self.arrays.items()}
        names = {"int8": "I8", "float32": "F32", "float8_e4m3fn": "F8_E4M3"}
        self.dtypes = {name: names[array.dtype.name] for name, array in self.arrays.items()}

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        return self.arrays[name][index]


@pytest.mark.parametrize(
    ("weights", "scales"),
    [
        ({"type": "int", "strategy": "tensor", "symmetric": False}, (1,)),
        ({"type": "int", "strategy": "channel", "symmetric": False}, (16, 1)),
        ({"type": "float", "strategy": "group", "group_size": 64}, (16, 2)),
    ],
)
def test_strategies_of_compressed_tensors_by_their_definition(weights: dict[str, Any], scales: tuple[int, ...]) -> None:
    """(code - zero point) * scale; what the goldens have not. By columns on 4 devices the groups are cut."""
    random = np.random.default_rng(0)
    kind = weights["type"]
    codes = random.integers(-128, 128, (16, 128)).astype(np.int8 if kind == "int" else ml_dtypes.float8_e4m3fn)
    arrays = {"weight": codes, "weight_scale": random.uniform(0.01, 0.1, scales).astype(np.float32)}
    if not weights.get("symmetric", True):
        arrays["weight_zero_point"] = random.integers(-128, 128, scales).astype(np.int8)
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, **weights}}
    config = {"quant_method": "compressed-tensors", "format": f"{kind}-quantized", "config_groups": {"group_0": group}}
    scheme = read_quantization({"quantization_config": config}, None).with_scales("float32").scheme(MODULE)
    assert scheme is not None

    def spread(values: np.ndarray) -> np.ndarray:
        blocks = values.astype(np.float32).reshape(-1, scales[-1])
        return np.repeat(np.repeat(blocks, 16 // blocks.shape[0], axis=0), 128 // blocks.shape[1], axis=1)

    expected = codes.astype(np.float32) - spread(arrays.get("weight_zero_point", np.zeros(scales, np.int8)))
    expected *= spread(arrays["weight_scale"])
    checkpoint = Arrays(**arrays)

    def matrix(columns: int) -> QuantizedMatrix:
        return QuantizedMatrix((Source(f"{MODULE}.weight", (Axis("outputs", 16), Axis("inputs", 128, columns))),), scheme)

    check_tensors([*matrix(0).parts().values()], checkpoint)
    np.testing.assert_array_equal(dequantized(matrix(0), checkpoint)[0], expected)
    parts = [dequantized(matrix(4), checkpoint, shard, 4)[0] for shard in range(4)]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), expected)


@pytest.mark.parametrize("shape", [(1,), (1, 1), (16,), (16, 1)])
def test_fp8_scales_are_one_or_one_a_row(shape: tuple[int, ...]) -> None:
    """Method "fp8" does not say which; on 4 devices each has those of its rows."""
    random = np.random.default_rng(0)
    codes = random.integers(-100, 100, (16, 32)).astype(ml_dtypes.float8_e4m3fn)
    checkpoint = Arrays(weight=codes, weight_scale=random.uniform(0.01, 0.1, shape).astype(np.float32))
    scheme = read_quantization({"quantization_config": {"quant_method": "fp8"}}, None).scheme(MODULE)
    assert scheme is not None
    matrix = QuantizedMatrix((Source(f"{MODULE}.weight", (Axis("outputs", 16, 4), Axis("inputs", 32))),), scheme)
    check_tensors([*matrix.parts().values()], checkpoint)
    expected = codes.astype(np.float32) * checkpoint.arrays[f"{MODULE}.weight_scale"].reshape(-1, 1)
    np.testing.assert_array_equal(np.concatenate([dequantized(matrix, checkpoint, shard, 4)[0] for shard in range(4)]), expected)


def test_fp8_scales_of_another_number() -> None:
    scheme = read_quantization({"quantization_config": {"quant_method": "fp8"}}, None).scheme(MODULE)
    assert scheme is not None
    matrix = QuantizedMatrix((Source(f"{MODULE}.weight", (Axis("outputs", 16), Axis("inputs", 32))),), scheme)
    for shape in ((0,), (8, 1), (1, 16)):
        checkpoint = Arrays(weight=np.ones((16, 32), ml_dtypes.float8_e4m3fn), weight_scale=np.ones(shape, np.float32))
        with pytest.raises(WeightsError, match=r"weight_scale is \[.*\], neither a single number nor \[16, 1\]$"):
            matrix.read(checkpoint, 0, 1)


class Blocks:
    """A checkpoint of one GGUF matrix."""

    def __init__(self, packed: np.ndarray, k: int):
        self.packed, self.shapes = packed, {f"{MODULE}.weight": (len(packed), k)}

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        assert name == f"{MODULE}.weight{BLOCKS}"
        return self.packed[index]


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"])
def test_gguf_blocks_are_dequantized_as_by_the_gguf_package(kind: str) -> None:
    """Random bytes but for the scales, which are small; 4 devices have parts of blocks of 256."""
    number = GGMLQuantizationType[kind]
    checkpoint = Blocks(random_blocks(kind, 8, 512, np.random.default_rng(0)), 512)
    expected = dequantize(checkpoint.packed, number)

    def matrix(columns: int) -> QuantizedMatrix:
        return QuantizedMatrix((Source(f"{MODULE}.weight", (Axis("outputs", 8), Axis("inputs", 512, columns))),), gguf_scheme(kind))

    np.testing.assert_array_equal(dequantized(matrix(0), checkpoint)[0], expected)
    parts = [dequantized(matrix(4), checkpoint, shard, 4)[0] for shard in range(4)]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), expected)


@pytest.mark.parametrize(("name", "tolerance"), [("fp8", 0.04), ("eetq", 0.01), ("bitsandbytes-nf4", 0.1), ("bitsandbytes-fp4", 0.13)])
def test_quantizing_on_load(name: str, tolerance: float) -> None:
    """Relative error of normally distributed weights; a row of zeros stays one."""
    weight = np.random.default_rng(0).standard_normal((48, 256)).astype(np.float32)
    weight[3] = 0
    layout = SCHEMES[name].layout
    arrays = pack(quantize_on_load(jnp.asarray(weight), layout, cut_columns=False), layout)
    found = np.asarray(weight_of(arrays, layout, 256).dequantize(jnp.float32))
    assert 0.001 < np.linalg.norm(found - weight) / np.linalg.norm(weight) < tolerance
    assert (found[3] == 0).all()


@pytest.mark.parametrize("name", ["fp8", "eetq"])
def test_quantizing_rows_of_tiny_numbers_on_load(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By numpy, which keeps numbers below 2^-126 as a GPU does; XLA's CPU code takes them for zero."""
    numpy = SimpleNamespace(**vars(np) | {"float8_e4m3fn": ml_dtypes.float8_e4m3fn})
    monkeypatch.setattr("jaxserve.models.formats.on_load.jnp", numpy)
    largest = np.array([1e-45, 1e-42, 1e-40, 1e-38, 1e-37, 1e-36, 5e-36, 1e-35, 1e-30, 1], np.float32)
    weight = largest[:, None] * np.array([1, -0.3, 0, 0.01], np.float32)
    with np.errstate(all="ignore"):
        found = quantize_on_load(weight, SCHEMES[name].layout, cut_columns=False)  # type: ignore[arg-type]
    elements = found["codes"].astype(np.float32) * found["scales"]
    error = np.abs(elements - weight).max(axis=1) / largest
    assert np.isfinite(elements).all() and (error[-3:] < 0.04).all() and (error <= 1).all()


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_on_load_codes_are_those_of_bitsandbytes(kind: str) -> None:
    """What bitsandbytes dequantizes to, quantized again, is itself."""
    case = Case(f"bitsandbytes-{kind}")
    flat = case.dequantized.reshape(-1, 64)
    layout = Layout(kind, 64)  # type: ignore[arg-type]
    arrays = pack(quantize_on_load(jnp.asarray(flat), layout, cut_columns=False), layout)
    np.testing.assert_array_equal(weight_of(arrays, layout, 64).dequantize(jnp.float32), flat)


PACKED = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"quant_method": "exl2"}, "quant_method 'exl2' is not supported"),
    ({"quant_method": ["gptq"]}, "is not supported"),
    ({"quant_method": "gptq"}, "bits is missing"),
    ({"quant_method": "gptq", "bits": 3}, "bits 3 is not supported"),
    ({"quant_method": "gptq", "bits": 4, "group_size": 100}, "group_size 100"),
    ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
    ({"quant_method": "gptq", "bits": 4, "dynamic": {"-:.*": {}}}, "dynamic"),
    ({"quant_method": "gptq", "bits": 4, "extra_config": {"lm_head": {"bits": 8}}}, "extra_config"),
    ({"quant_method": "awq", "bits": 4, "extra_config": {"lm_head": {"bits": 8}}}, "extra_config"),
    ({"quant_method": "awq", "bits": 4, "dynamic": {"-:.*": {}}}, "dynamic"),
    ({"quant_method": "gguf"}, "quant_method 'gguf' goes with a .gguf file"),
    ({"quant_method": "gguf", "types": {MODULE: "Q4_0"}}, "quant_method 'gguf' goes with a .gguf file"),
    ({"load_in_4bit": False}, "quant_method None is not supported"),
    ({"quant_method": "gptq", "bits": 4, "modules_in_block_to_quantize": "all"}, "modules_in_block_to_quantize"),
    ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version gemv"),
    ({"quant_method": "awq", "bits": 4, "modules_to_not_convert": 3}, "modules_to_not_convert must be a list"),
    ({"quant_method": "fp8", "activation_scheme": "guess"}, "activation_scheme 'guess'"),
    ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt e5m2"),
    ({"quant_method": "fp8", "weight_block_size": [0, 128]}, "weight_block_size"),
    ({"quant_method": "bitsandbytes"}, "neither load_in_4bit"),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": True}, "both load_in_4bit and load_in_8bit"),
    *(
        ({"quant_method": "compressed-tensors", "format": form, "config_groups": {"a": {"weights": weights}}}, message)
        for form, weights, message in (
            ("mxfp4-pack-quantized", {"num_bits": 4, "type": "float", "group_size": 16}, "in groups of 32, and nothing else is"),
            ("int-quantized", {"num_bits": 4, "type": "int", "strategy": "group"}, "4 bits of type 'int' in format int-quantized"),
            ("mxfp8-quantized", {"num_bits": 8, "type": "float"}, "format mxfp8-quantized is not supported"),
            ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": False}, "zero points of floats"),
            *(("pack-quantized", PACKED | {"group_size": odd}, f"group_size {odd} is not supported (even ones are") for odd in (1, 25)),
            ("marlin-24", {"num_bits": 4, "type": "int"}, "format marlin-24 is not supported"),
        )
    ),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"}, "bnb_4bit_quant_storage"),
    ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quant_algo 'NVFP4' is not supported"),
    ({"quant_method": "modelopt", "quantization": {"quant_algo": "W4A8_AWQ"}}, "quantization: quant_algo 'W4A8_AWQ'"),
    ({"quant_method": "modelopt", "quant_algo": "FP8", "exclude_modules": "lm_head"}, "exclude_modules must be a list"),
    ({"quant_method": "awq", "bits": 4, "version": "gemv_fast"}, "version gemv_fast"),
    ({"quant_method": "compressed-tensors"}, "config_groups"),
    ({"quant_method": "compressed-tensors", "config_groups": {"a": {}}, "format": "nvfp4-pack-quantized"}, "nvfp4-pack-quantized"),
    ({"quant_method": "compressed-tensors", "config_groups": {"a": {}}, "format": "pack-quantized"}, "weights must be an object"),
    ({"quant_method": "compressed-tensors", "config_groups": {"a": {}}, "ignore": ["re:("]}, "no regular expression"),
    ({"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24"}}, "sparsity_config"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED)
def test_options_that_are_not_supported_are_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message.replace("(", r"\(")) as caught:
        read_quantization({"quantization_config": config}, None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "quantize", "message"),
    [
        ("gptq-4-128", "awq", "--quantize awq: the checkpoint is quantized already, by gptq"),
        ("awq-32", "fp8", "by awq"),
        ("bitsandbytes-nf4", "bitsandbytes-fp4", "by bitsandbytes nf4"),
        ("compressed-tensors-w8a8-fp8", "eetq", "by compressed-tensors"),
        (None, "gptq", "--quantize gptq: the checkpoint is not quantized"),
        (None, "marlin", "not quantized"),
    ],
)
def test_quantize_against_another_checkpoint(config: str | None, quantize: str, message: str) -> None:
    with pytest.raises(StartupError, match=message):
        read_quantization({"quantization_config": CONFIGS[config]} if config else {}, quantize)


@pytest.mark.parametrize(
    ("config", "quantize"),
    [
        ("gptq-4-128", "marlin"),
        ("awq-32", "awq"),
        ("fp8-block", "fp8"),
        ("bitsandbytes-nf4", "bitsandbytes-nf4"),
        ("bitsandbytes-int8", "bitsandbytes"),
    ],
)
def test_quantize_that_names_what_the_checkpoint_has(config: str, quantize: str) -> None:
    declared = {"quantization_config": CONFIGS[config]}
    assert read_quantization(declared, quantize) == read_quantization(declared, None)


def test_configurations_from_before_methods_had_names() -> None:
    for config in ({"load_in_8bit": True}, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}):
        named = {"quantization_config": {"quant_method": "bitsandbytes", **config}}
        assert read_quantization({"quantization_config": {"load_in_4bit": False, **config}}, None) == read_quantization(named, None)


def test_a_kv_cache_alone_leaves_weights_plain() -> None:
    config = {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": {"num_bits": 8, "type": "float"}}
    assert read_quantization({"quantization_config": config}, None) == Quantization()
    assert read_quantization({"quantization_config": config}, "fp8") == read_quantization({}, "fp8")
    with pytest.raises(StartupError, match="--quantize compressed-tensors: the checkpoint is not quantized"):
        read_quantization({"quantization_config": config}, "compressed-tensors")
    with pytest.raises(UnsupportedModel, match="config_groups must be"):
        read_quantization({"quantization_config": config | {"kv_cache_scheme": None}}, None)


def test_what_tells_of_fewer_modules_goes_first() -> None:
    """A name, an expression, a class, in whichever order groups of compressed-tensors are; what is ignored before all."""
    down, up = "model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj"
    targets = {"Linear": 32, "re:.*(down|up)_proj": 64, down: 128}
    for order in permutations(targets):
        groups = {name: {"targets": [name], "weights": PACKED | {"group_size": targets[name]}} for name in order}
        config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups, "ignore": ["re:.*k_proj"]}
        read = read_quantization({"quantization_config": config}, None)
        found = [scheme and scheme.group for scheme in map(read.scheme, (down, up, "lm_head", "model.layers.0.self_attn.k_proj"))]
        assert found == [128, 64, 32, None], order


def schemes(quantization: Quantization, *modules: str) -> list[bool]:
    """Whether each module is quantized."""
    return [quantization.scheme(module) is not None for module in modules]


def test_activations_of_8_bits_are_not_rounded_where_weights_have_4() -> None:
    """W4A8 is served as W4A16, which is more exact."""
    config = CONFIGS["compressed-tensors-w4a16-group"]
    (plain,) = read_quantization({"quantization_config": config}, None).schemes
    (group,) = config["config_groups"].values()
    for kind in ("int", "float"):
        rounded = group | {"input_activations": {"num_bits": 8, "type": kind, "strategy": "token", "dynamic": True}}
        assert read_quantization({"quantization_config": config | {"config_groups": {"a": rounded}}}, None).schemes == (plain,)


def test_lists_of_dense_modules() -> None:
    q, head = "model.layers.1.self_attn.q_proj", "lm_head"
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    assert schemes(read_quantization({"quantization_config": gptq}, None), q, head, "model.embed_tokens") == [True, False, False]
    assert schemes(read_quantization({"quantization_config": gptq | {"lm_head": True}}, None), q, head) == [True, True]
    blocks = gptq | {"modules_in_block_to_quantize": [["self_attn.q_proj"], ["mlp.up_proj"]]}
    assert schemes(read_quantization({"quantization_config": blocks}, None), q, "model.layers.0.mlp.down_proj") == [True, False]
    part = read_quantization({"quantization_config": gptq | {"quant_method": "awq", "modules_to_not_convert": ["gate", "h_x"]}}, None)
    assert schemes(part, "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj", q) == [False, True, True]
    for declared, field in (
        ({"quant_method": "awq", "bits": 4}, "modules_to_not_convert"),
        (gptq, "modules_to_not_convert"),
        ({"quant_method": "fp8"}, "modules_to_not_convert"),
        ({"quant_method": "fp8"}, "ignored_layers"),
        ({"quant_method": "fbgemm_fp8"}, "modules_to_not_convert"),
        ({"quant_method": "mxfp4"}, "modules_to_not_convert"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "llm_int8_skip_modules"),
    ):
        for names in (["layers.1"], ["q_proj"], [q], ["model.layers.1.self_attn"]):
            read = read_quantization({"quantization_config": declared | {field: names}}, None)
            assert schemes(read, q, "model.layers.11.mlp.up_proj") == [False, True], (declared, field, names)
    for names in (["model.layers.1*"], ["*.q_proj", "lm_head"], ["model.layers.1"]):
        modelopt = {"quant_method": "modelopt", "quantization": {"quant_algo": "FP8", "exclude_modules": names}}
        found = schemes(read_quantization({"quantization_config": modelopt}, None), q, "model.layers.0.mlp.up_proj")
        assert found == [False, True], names
    compressed = CONFIGS["compressed-tensors-w4a16-group"]
    for ignored in ([head, q], ["re:.*q_proj", head], ["re:.*self_attn", head]):
        read = read_quantization({"quantization_config": compressed | {"ignore": ignored}}, None)
        assert schemes(read, q, head, "model.layers.1.mlp.up_proj") == [False, False, True], ignored
    assert schemes(read_quantization({"quantization_config": compressed | {"ignore": []}}, None), head) == [True]
    assert Quantization().scheme(q) is None and Quantization("x", (), (Rule(".*", -1),)).scheme(q) is None


def damages() -> Iterator[tuple[str, dict[str, np.ndarray], str]]:
    """(case, changed tensors, message)."""
    case = Case("gptq-4-128")
    zeros = case.whole_of("gptq-4-128/qzeros").copy()
    zeros[0, 0] ^= 1
    yield "gptq-4-128", {"qzeros": zeros}, "not those of symmetric weights"
    yield "gptq-4-32-asym", {"g_idx": np.arange(128, dtype=np.int32)[::-1] // 32}, "not in order"
    yield "gptq-4-32-desc_act", {"g_idx": np.zeros(128, np.int32)}, "does not give each group 32 columns"
    yield "bitsandbytes-nf4", {"weight.quant_map": np.zeros(16, np.float32)}, "not that of nf4"
    yield "bitsandbytes-nf4", {"weight.quant_state.bitsandbytes__nf4": np.zeros(9, np.uint8)}, "damaged"
    state = np.frombuffer(json.dumps({"blocksize": 128, "shape": [32, 128]}).encode(), np.uint8)
    yield "bitsandbytes-nf4", {"weight.quant_state.bitsandbytes__nf4": state}, "blocksize is 128, not 64"


@pytest.mark.parametrize(("name", "changed", "message"), [*damages()])
def test_tensors_that_contradict_the_configuration(name: str, changed: dict[str, np.ndarray], message: str) -> None:
    case = Case(name, changed)
    with pytest.raises(WeightsError, match=message) as caught:
        case.matrix().read(case, 0, 1)
    assert "\n" not in str(caught.value)


def test_tensors_that_do_not_fit_the_configuration() -> None:
    """Another group size, no zero points, another dtype: told before anything is read."""
    case = Case("gptq-4-128")
    case.shapes[f"{MODULE}.scales"] = (2, 32)
    del case.shapes[f"{MODULE}.qzeros"]
    case.dtypes[f"{MODULE}.qweight"] = "I64"
    with pytest.raises(WeightsError) as caught:
        check_tensors([*case.matrix().parts().values()], case)
    for part in (f"missing: {MODULE}.qzeros", f"{MODULE}.scales is [2, 32], not [1, 32]", f"{MODULE}.qweight has dtype I64, not I32"):
        assert part in str(caught.value)


def test_gguf_types_that_stay_quantized_by_hand() -> None:
    """One block of Q4_0, against its definition."""
    row = quantize(np.linspace(-1, 1, 32, dtype=np.float32)[None], GGMLQuantizationType.Q4_0)
    scale = row[0, :2].view(np.float16)[0].astype(np.float32)
    codes = np.concatenate([row[0, 2:] & 15, row[0, 2:] >> 4]).astype(np.float32) - 8
    matrix = QuantizedMatrix((Source(f"{MODULE}.weight", (Axis("outputs", 1), Axis("inputs", 32))),), gguf_scheme("Q4_0"))
    np.testing.assert_array_equal(dequantized(matrix, Blocks(row, 32))[0][0], codes * scale)
