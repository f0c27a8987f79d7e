"""Quantized checkpoints that contradict themselves: one line that names what is wrong, never other weights than were meant."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from quantized_models import write_quantized
from safetensors.numpy import save_file
from test_quantized_models import CONFIGS, INT4, INT8, TOKEN, compressed, load

from jaxserve.errors import StartupError, UnsupportedModel
from jaxserve.models.formats import read_quantization
from jaxserve.weights.safetensors_folder import SafetensorsCheckpoint

Q = "model.layers.0.self_attn.q_proj"
FORMS = CONFIGS | {
    "w4a16-sym": compressed("pack-quantized", INT4),
    "w8a8-static": compressed("int-quantized", INT8, {"num_bits": 8, "type": "int", "dynamic": False}),
}


@pytest.fixture(scope="module")
def tensors_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, dict[str, np.ndarray]]]:
    """(folder, tensors) of one of FORMS."""

    def make(form: str) -> tuple[Path, dict[str, np.ndarray]]:
        folder = write_quantized(tmp_path_factory.mktemp(form), FORMS[form])
        checkpoint = SafetensorsCheckpoint(folder)
        return folder, {name: checkpoint.read(name, tuple(map(slice, shape))) for name, shape in checkpoint.shapes.items()}

    return make


def state(**changed: Any) -> np.ndarray:
    whole = {"blocksize": 64, "shape": [64, 64], "nested_blocksize": 256, "nested_offset": 0.02} | changed
    return np.frombuffer(json.dumps(whole).encode(), np.uint8)


STATE = "weight.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    ("form", "name", "tensor", "message"),
    [
        ("gptq", "scales", np.full((2, 64), np.nan, np.float16), "q_proj has scales that are infinite or not numbers"),
        ("w8a8", "weight_scale", np.full((64, 1), np.inf, np.float32), "q_proj has scales that are infinite"),
        ("fp8", "weight", np.full((64, 64), -np.nan, ml_dtypes.float8_e4m3fn), "q_proj has codes that are infinite or not numbers"),
        ("mxfp4", "_scales", np.full((64, 2), 255, np.uint8), "q_proj has scales that are infinite or not numbers"),
        ("gptq", "scales", np.full((2, 64), 1e300), "q_proj has scales that are infinite or not numbers"),
        ("gptq", "scales", np.full((2, 64), 3e38, np.float32), "q_proj has scales up to 3e.38, whose products with its codes are beyond"),
        ("awq", "scales", np.full((2, 64), 3e38, ml_dtypes.bfloat16), "q_proj has scales up to .*e.38, whose products"),
        ("fp8", "weight_scale", np.array([1e37], np.float32), "q_proj has scales up to 1e.37, whose products"),
        ("mxfp4", "_scales", np.full((64, 2), 254, np.uint8), "q_proj has scales up to 1.70141e.38, whose products"),
        ("w8a8-static", "input_scale", np.array([0.0], np.float32), "q_proj.input_scale is not a number above zero"),
        ("w8a8-static", "input_scale", np.array([np.nan], np.float32), "q_proj.input_scale is not a number above zero"),
        ("w8a8-static", "input_zero_point", np.array([3], np.int8), "q_proj.input_zero_point is not zero"),
        ("w8a8", "weight_zero_point", np.full((64, 1), 3, np.int8), "q_proj.weight_zero_point is not zero"),
        ("w4a16-sym", "weight_zero_point", np.full((8, 2), 0x12345678, np.int32), "q_proj.weight_zero_point is not zero"),
        ("w4a16-sym", "weight_shape", np.array([64, 48]), r"q_proj.weight_shape is \[64, 48\], not \[64, 64\]"),
        ("bnb-int8", "weight_format", np.array(1, np.uint8), "q_proj.weight_format is 1, which is not supported"),
        ("nf4-double", STATE, state(shape=[128, 32]), r"shape is \[128, 32\], not \[64, 64\]"),
        ("nf4-double", STATE, state(shape="ab"), "shape is 'ab', not"),
        ("nf4-double", STATE, state(blocksize=0), "blocksize is 0, not 64"),
        ("nf4-double", STATE, state(quant_type="fp4"), "quant_type is 'fp4', not 'nf4'"),
        ("nf4-double", STATE, state(nested_offset=None), "nested_offset must be a number. Found: None"),
        ("nf4-double", STATE, state(nested_offset=10**400), "nested_offset must be a number"),
        ("nf4-double", STATE, np.full(100_000, ord("["), np.uint8), "is damaged"),
    ],
)  # fmt: skip
def test_tensors(tensors_of: Any, form: str, name: str, tensor: np.ndarray, message: str) -> None:
    folder, tensors = tensors_of(form)
    key = Q + name if name.startswith("_") else f"{Q}.{name}"
    save_file(tensors | {key: np.array(tensor)}, folder / "model.safetensors")
    with pytest.raises(StartupError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_zero_points_that_are_zero_do_no_harm(tensors_of: Any) -> None:
    zeros = {
        "w8a8-static": {f"{Q}.weight_zero_point": np.zeros((64, 1), np.int8), f"{Q}.input_zero_point": np.array([0], np.int8)},
        "w4a16-sym": {f"{Q}.weight_zero_point": np.full((8, 2), -0x77777778, np.int32)},
    }
    for form, added in zeros.items():
        folder, tensors = tensors_of(form)
        save_file(tensors | added, folder / "model.safetensors")
        load(folder)


@pytest.mark.parametrize(
    ("form", "changed", "message"),
    [
        ("gptq", {"format": "marlin"}, "'marlin' is not supported"),
        ("gptq", {"format": "gptq_v2", "checkpoint_format": "gptq"}, "format 'gptq_v2' is not supported"),
        ("gptq", {"pack_dtype": "int16"}, "pack_dtype 'int16' is not supported"),
        ("gptq", {"is_marlin_format": True}, "is_marlin_format True"),
        ("gptq", {"adapter": {"name": "lora"}}, "adapter"),
        ("gptq", {"rotation": "hadamard"}, "rotation 'hadamard' is not supported"),
        ("awq", {"format": "gemv"}, "format 'gemv' is not supported"),
        ("awq", {"backend": "llm-awq"}, "backend 'llm-awq' is not supported"),
        ("awq", {"zero_point": False}, "zero_point False is not supported"),
        ("awq", {"w_bit": 3}, "w_bit 3 is not supported"),
        ("w8a8", {"ignore": ["re:" + "(" * 500 + ")" * 500]}, "is no regular expression"),
        ("w8a8", {"ignore": ["re:a{99999999999}"]}, "is no regular expression|repeats too much"),
        ("w8a8", {"ignore": ["re:(((a{1000}){1000}){1000}){1000}"]}, "repeats too much"),
    ],
)
def test_options(form: str, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message) as caught:
        read_quantization({"quantization_config": FORMS[form] | changed}, None)
    assert "\n" not in str(caught.value)


def test_version_2_zero_points_under_either_name() -> None:
    for name in ("format", "checkpoint_format"):
        (scheme,) = read_quantization({"quantization_config": FORMS["gptq"] | {name: "gptq_v2"}}, None).schemes
        assert scheme.variant == "gptq_v2"


def test_regular_expressions_of_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags hold for the whole expression; matching is given up where it does not end."""
    config = compressed("int-quantized", INT8, TOKEN, ignore=("re:(?i).*K_PROJ",))
    quantization = read_quantization({"quantization_config": config}, None)
    assert quantization.scheme("model.layers.0.self_attn.k_proj") is None
    assert quantization.scheme("model.layers.0.self_attn.v_proj") is not None
    monkeypatch.setattr("jaxserve.models.formats.quantization._MATCH_SECONDS", 0.01)
    endless = r"re:(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)\9\8\7\6\5[XYZ]"
    quantization = read_quantization({"quantization_config": compressed("int-quantized", INT8, TOKEN, ignore=(endless,))}, None)
    with pytest.raises(UnsupportedModel, match="takes too long to match"):
        quantization.scheme("model.layers.0.self_attn.k_proj")


@pytest.mark.parametrize(
    ("form", "size", "shards", "message"),
    [
        ("gptq", 100, 1, "mlp.down_proj has 100 columns, which are not packed in pieces of 8"),
        ("awq", 100, 1, "has 100 rows, which are not packed in pieces of 8"),
        ("mxfp4", 80, 1, "mlp.down_proj has 80 columns, which are not packed in pieces of 32"),
        ("w4a16-sym", 100, 4, "mlp.down_proj: 25 columns for each device of 4 are an odd number, which int4 does not pack"),
        ("nf4-double", 97, 1, "mlp.down_proj: 97 columns for each device of 1 are an odd number, which nf4 does not pack"),
    ],
)
def test_sizes_that_a_format_does_not_have(form: str, size: int, shards: int, message: str, tmp_path: Path) -> None:
    """Whatever the tensors are: config.json says it, before any is looked for."""
    folder = write_quantized(tmp_path, FORMS[form])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": size}))
    with pytest.raises(StartupError, match=message):
        load(folder, shards)
