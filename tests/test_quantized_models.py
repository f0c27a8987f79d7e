"""Tiny models with quantized matrices: their logits are those of the dequantized model, on one device and on four."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from plain_forward import logits_of, make_mesh
from quantized_models import made_dense, write_quantized
from safetensors.numpy import load_file, save_file
from tiny_gguf import random_blocks, write_gguf
from tiny_models import CONFIGS as TINY
from tiny_models import make_tensors, write_checkpoint

from jaxserve.cli import main
from jaxserve.config import ModelOptions
from jaxserve.errors import StartupError, WeightsError
from jaxserve.models import Model
from jaxserve.models.formats import read_quantization
from jaxserve.models.kv_scaling import KVScaling
from jaxserve.models.parameters import Parameter
from jaxserve.weights import resolve_model
from jaxserve.weights.loader import load_model
from jaxserve.weights.safetensors_folder import SafetensorsCheckpoint

INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
FP8 = {"num_bits": 8, "type": "float", "symmetric": True}
TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def compressed(
    form: str, weights: dict[str, Any], activations: dict[str, Any] | None = None, ignore: tuple[str, ...] = ()
) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    ignored = ["lm_head", *ignore]
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}, "ignore": ignored}


MIXED = {
    "attention": {"targets": ["re:.*self_attn.*"], "weights": INT4 | {"symmetric": False}},
    "network": {"targets": ["re:.*mlp.*"], "weights": INT8 | {"strategy": "group", "group_size": 64}},
}
OTHERS = {
    "rows": {"format": "float-quantized", "targets": ["re:.*(gate|up)_proj"], "weights": FP8 | {"strategy": "channel"}},
    "blocks": {
        "format": "float-quantized", "targets": ["re:.*[kv]_proj"], "weights": FP8 | {"strategy": "block", "block_structure": [16, 32]},
    },
    "sorted": {"format": "pack-quantized", "targets": ["re:.*down_proj"], "weights": INT4 | {"actorder": "group"}},
    "floats": {"format": "mxfp4-pack-quantized", "targets": ["re:.*[qo]_proj"], "weights": {"num_bits": 4, "type": "float"}},
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "lm_head": True},
    "gptq-8-desc_act": {"quant_method": "gptq", "bits": 8, "group_size": 64, "sym": False, "desc_act": True},
    "gptq-row": {"quant_method": "gptq", "bits": 4, "group_size": -1, "sym": False},
    "gptq-v2-128": {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": False, "checkpoint_format": "gptq_v2"},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "modules_to_not_convert": ["mlp.gate_proj", "v_proj"]},
    "fp8": {"quant_method": "fp8", "activation_scheme": "static"},
    "fp8-block": {"quant_method": "fp8", "weight_block_size": [16, 32], "ignored_layers": ["model.layers.0.mlp.down_proj"]},
    "fbgemm": {"quant_method": "fbgemm_fp8", "modules_to_not_convert": ["k_proj"]},
    "nf4": {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": ["gate_proj"],
    },
    "nf4-double": {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
    },
    "fp4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "bnb-int8": {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_skip_modules": ["o_proj"]},
    "mxfp4": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.0.self_attn.v_proj", "lm_head"]},
    "w4a16-w8a16": compressed("pack-quantized", INT4, ignore=("model.layers.0.self_attn.k_proj",)) | {"config_groups": MIXED},
    "w8a8": compressed("int-quantized", INT8, TOKEN),
    "fp8-mxfp4-actorder": compressed("mixed-precision", {}) | {"config_groups": OTHERS},
}  # fmt: skip
LISTS = ("ignored_layers", "llm_int8_skip_modules", "modules_to_not_convert")
WIDE = {"hidden_size": 256, "intermediate_size": 384}
TOKENS = list(range(5, 21))


def load(folder: Path, tensor: int = 1, **options: Any) -> Model:
    model_options = ModelOptions(model_id=str(folder), **options)
    return load_model(resolve_model(model_options), model_options, make_mesh(tensor))


def check(quantized: Model, sharded: Model | None = None, shards: int = 1) -> Model:
    """Hold their logits against those of the model made dense, which is returned.

    Args:
        shards: devices of `quantized`.
        sharded: the same on 4 devices.
    """
    dense = made_dense(quantized, make_mesh(shards))
    expected = logits_of(dense, make_mesh(shards), TOKENS, 16)
    assert expected.std() > 0.3
    np.testing.assert_allclose(logits_of(quantized, make_mesh(shards), TOKENS, 16), expected, atol=1e-3, rtol=0)
    if sharded is not None:
        np.testing.assert_allclose(logits_of(sharded, make_mesh(4), TOKENS, 16), expected, atol=1e-3, rtol=0)
    return dense


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_of_a_quantized_checkpoint(name: str, tmp_path: Path) -> None:
    """On a 1x4 mesh feed-forward units are cut at 24, within groups of 32; at 96 and columns of heads at 64, where there are several
    groups of 64 or 128. In "w4a16-w8a16" the last group of a row of 96 is shorter."""
    folder = write_quantized(tmp_path, CONFIGS[name], **(WIDE if CONFIGS[name].get("group_size", 0) > 32 else {}))
    quantized = load(folder)
    names = [parameter.sources[0].name for parameter in quantized.architecture.parameters if isinstance(parameter, Parameter)]
    for module in (module for field in LISTS for module in CONFIGS[name].get(field, ())):
        assert any(dense.endswith(f"{module}.weight") for dense in names)
    dense = check(quantized, load(folder, 4))
    assert quantized.nbytes < 0.8 * sum(np.prod(p.shape(1)) * 4 for p in dense.architecture.parameters)


def test_logits_of_a_gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every type that stays quantized. On a 1x4 mesh blocks of 256 are cut at 128 units of the network and at 64 columns of heads."""
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
    monkeypatch.setitem(TINY, "llama-wide", config := TINY["llama"] | shape)
    kinds = {"q": "Q4_K", "k": "Q6_K", "v": "Q5_K", "o": "Q5_K", "gate": "Q4_0", "up": "Q4_1", "down": "Q6_K", "lm_head": "Q4_K"}
    tensors, random = make_tensors(config, 7), np.random.default_rng(0)
    blocks: dict[str, tuple[np.ndarray, GGMLQuantizationType]] = {}
    for name in [name for name, tensor in tensors.items() if tensor.ndim == 2]:
        kind = kinds.get(name.removesuffix(".weight").split(".")[-1].removesuffix("_proj"), "Q8_0")
        n, k = tensors.pop(name).shape
        blocks[name] = random_blocks(kind, n, k, random), GGMLQuantizationType[kind]
    path = write_gguf(tmp_path / "model.gguf", "llama-wide", tensors, blocks=blocks)
    quantized = load(path)
    assert quantized.config.quantization.description == "gguf (Q4_0, Q4_1, Q4_K, Q5_K, Q6_K, Q8_0)"
    check(quantized, load(path, 4))


@pytest.mark.parametrize("name", ["fp8", "eetq", "bitsandbytes-nf4", "bitsandbytes-fp4"])
def test_logits_of_a_checkpoint_quantized_on_load(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = 2 if name == "fp8" else 1  # of several, each gets its own: once is enough
    monkeypatch.setitem(TINY, "llama-bias", TINY["llama-bias"] | {"num_hidden_layers": layers})
    folder = write_checkpoint(tmp_path, "llama-bias")
    quantized = load(folder, quantize=name)
    sharded = load(folder, 4, quantize=name)
    if not name.startswith("bitsandbytes-"):
        check(quantized, sharded)
        return
    # Each shard has groups of its own where codes of 4 bits are cut at 24 columns.
    check(quantized)
    check(sharded, shards=4)
    plain = logits_of(load(folder), make_mesh(1), TOKENS, 16)
    missed = [(logits_of(one, make_mesh(shards), TOKENS, 16) - plain).std() for one, shards in ((quantized, 1), (sharded, 4))]
    assert missed[1] == pytest.approx(missed[0], rel=0.2)


@pytest.mark.parametrize(
    ("name", "quantize", "told"),
    [
        ("awq", None, "awq (int4)"),
        ("awq", "gptq", "awq (int4)"),
        ("awq", "marlin", "awq (int4)"),
        ("gptq-8-desc_act", "marlin", "gptq (int8)"),
        ("gptq", "awq", "by gptq"),
        ("nf4-double", "bitsandbytes-nf4", "bitsandbytes nf4"),
        ("nf4-double", "bitsandbytes-fp4", "by bitsandbytes nf4"),
        ("fp8-block", "fp8", "fp8"),
        ("w4a16-w8a16", "fp8", "by compressed-tensors"),
        (None, "eetq", "eetq (int8)"),
        (None, "awq", "is not quantized"),
        (None, None, ""),
    ],
)
def test_what_tgis_names_take_and_what_is_told(name: str | None, quantize: str | None, told: str) -> None:
    """TGI serves AWQ checkpoints under the name gptq too."""
    config = {"quantization_config": CONFIGS[name]} if name else {}
    try:
        assert read_quantization(config, quantize).description == told
    except StartupError as error:
        assert quantize is not None and f"--quantize {quantize}: " in str(error) and told in str(error)


@pytest.mark.parametrize("name", ["gptq", "mxfp4", "nf4"])
def test_random_weights_of_a_quantized_shape(name: str, tmp_path: Path) -> None:
    folder = write_quantized(tmp_path, CONFIGS[name])
    (folder / "model.safetensors").unlink()
    one, two = load(folder, 4, load_format="dummy"), load(folder, 4, load_format="dummy")
    for leaf, other in zip(one.leaves, two.leaves, strict=True):
        np.testing.assert_array_equal(np.asarray(leaf).view(np.uint8), np.asarray(other).view(np.uint8))
    matrices = [leaf for leaf in made_dense(load(folder, load_format="dummy"), make_mesh(1)).leaves if leaf.ndim == 2]
    deviations = [float(leaf.std()) for leaf in matrices]
    # With a mean every layer would add to one direction, until all prompts have one answer.
    assert all(abs(float(leaf.mean())) < 4 * leaf.size**-0.5 * deviation for leaf, deviation in zip(matrices, deviations, strict=True))
    # MXFP4's scales are powers of two.
    assert deviations == pytest.approx([1e-3 / 3**0.5] * len(deviations), rel=0.3 if name == "mxfp4" else 0.15)


def test_older_files_beside_config_json(tmp_path: Path) -> None:
    folder = write_quantized(tmp_path, CONFIGS["gptq"])
    config = json.loads((folder / "config.json").read_text())
    declared = config.pop("quantization_config")
    del declared["quant_method"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="missing: lm_head"):
        load(folder)
    (folder / "quantize_config.json").write_text(json.dumps(declared))
    assert load(folder).config.quantization.method == "gptq"
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": None}))
    assert load(folder).config.quantization.method == "gptq"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("truncate", "not a complete safetensors file"),
        ("group", "of the wrong shape"),
        ("zeros", "missing: .*qzeros"),
        ("dtype", "of the wrong dtype: .*qweight has dtype I64, not I32"),
        ("method", "quant_method 'quip' is not supported"),
        ("flag", "--quantize fp8: the checkpoint is quantized already, by awq; without the flag it is served so$"),
        ("scales", "has scales that are infinite or not numbers$"),
    ],
)
def test_damaged_checkpoints(change: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command line tells of each in one line, and exits with 1."""
    folder = write_quantized(tmp_path, CONFIGS["awq"])
    path = folder / "model.safetensors"
    if change == "truncate":
        path.write_bytes(path.read_bytes()[:-100])
    elif change in ("group", "method"):
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] |= {"group_size": 64} if change == "group" else {"quant_method": "quip"}
        (folder / "config.json").write_text(json.dumps(config))
    elif change == "scales":
        save_file({name: np.full_like(tensor, np.nan) if "scales" in name else tensor for name, tensor in load_file(path).items()}, path)
    elif change == "dtype":
        save_file({name: tensor.astype(np.int64) if "qweight" in name else tensor for name, tensor in load_file(path).items()}, path)
    elif change == "zeros":
        save_file({name: tensor for name, tensor in load_file(path).items() if not name.endswith("qzeros")}, path)
    assert main(["bench", "latency", "--model-id", str(folder), *(["--quantize", "fp8"] if change == "flag" else [])]) == 1
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith("jaxserve: ") and re.search(message, told)


def test_biases_that_older_autogptq_gave_every_module(tmp_path: Path) -> None:
    folder = write_quantized(tmp_path, CONFIGS["gptq"])
    path, bias = folder / "model.safetensors", "model.layers.0.self_attn.o_proj.bias"
    tensors = load_file(path)
    save_file(tensors | {bias: np.zeros(64, np.float16), "lm_head.bias": np.zeros(320, np.float16)}, path)
    load(folder)
    for name in (bias, "model.layers.0.input_layernorm.bias"):
        save_file(tensors | {name: np.array([0, 1e-7], np.float16 if name == bias else np.float32)}, path)
        with pytest.raises(WeightsError, match=f"not part of the model: {name}$"):
            load(folder)


@pytest.mark.parametrize(("form", "told"), [("gptq", "qweight"), ("w4a16-w8a16", "weight_packed"), ("bnb-int8", "SCB")])
def test_quantized_tensors_that_nothing_tells_of(form: str, told: str, tmp_path: Path) -> None:
    folder = write_quantized(tmp_path, CONFIGS[form])
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=rf"{told} is of a quantized matrix, and nothing says how: config.json has no quant") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_modelopts_file_beside_config_json(tmp_path: Path) -> None:
    """Its FP8 is that of vLLM's static scales, with scales for a KV cache among the tensors."""
    folder = write_quantized(tmp_path, CONFIGS["fp8"])
    declared = read_quantization({"quantization_config": CONFIGS["fp8"]}, None)
    checkpoint = SafetensorsCheckpoint(folder)
    tensors = {name: checkpoint.read(name, tuple(map(slice, shape))) for name, shape in checkpoint.shapes.items()}
    scales = {f"model.layers.0.self_attn.{x}_proj.{x}_scale": np.array([0.5], np.float32) for x in "kv"}
    save_file(tensors | scales, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    inner = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}
    (folder / "hf_quant_config.json").write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": inner}))
    quantization = load(folder, quantize="fp8").config.quantization
    assert quantization.description == "modelopt (fp8)" and quantization.schemes == declared.schemes
    inner["kv_cache_quant_algo"] = "NVFP4"
    assert "kv_cache_quant_algo 'NVFP4'" in KVScaling.from_hf({"quantization_config": {"quantization": inner}}).refused
