"""GGUF files: names, row order, quantization types, metadata, and what is said of a damaged file."""

import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize, quantize
from plain_forward import make_mesh
from quantized_models import dense_leaves
from safetensors.numpy import load_file
from tiny_gguf import write_gguf
from tiny_models import CONFIGS, END_OF_TURN, EOS

from jaxserve.config import ModelOptions
from jaxserve.errors import ModelNotFound, StartupError, UnsupportedModel, WeightsError
from jaxserve.gguf_header import GGUFHeader, GGUFTensor, read_gguf_header
from jaxserve.models import Model
from jaxserve.weights import resolve_model
from jaxserve.weights.fingerprint import fingerprint
from jaxserve.weights.gguf_config import config_of_gguf
from jaxserve.weights.gguf_file import GGUFCheckpoint
from jaxserve.weights.loader import load_model, read_config

Tensors = Callable[[str], dict[str, np.ndarray]]


@pytest.fixture
def tensors(tiny_checkpoint: Callable[[str], Path]) -> Tensors:
    """Tensors of a tiny checkpoint by Hugging Face name."""
    return lambda name: load_file(tiny_checkpoint(name) / "model.safetensors")


def load(path: Path, tensor: int = 1) -> Model:
    options = ModelOptions(model_id=str(path))
    return load_model(resolve_model(options), options, make_mesh(tensor))


def llama3_divisors() -> np.ndarray:
    """rope_freqs.weight as llama.cpp's converter writes it for the scaling of "llama-rope-llama3"."""
    scaling = CONFIGS["llama-rope-llama3"]["rope_scaling"]
    wavelengths = 2 * np.pi * 1000.0 ** (np.arange(0, 8, 2) / 8)
    low, high = (scaling["original_max_position_embeddings"] / scaling[f"{name}_freq_factor"] for name in ("low", "high"))
    smooth = (scaling["original_max_position_embeddings"] / wavelengths - 1.0) / 3.0
    between = 1 / ((1 - smooth) / scaling["factor"] + smooth)
    return np.where(wavelengths < high, 1.0, np.where(wavelengths > low, scaling["factor"], between)).astype(np.float32)


GGUF_FORMS: list[tuple[str, dict[str, Any], dict[str, np.ndarray]]] = [
    ("llama", {}, {}),
    ("llama-bias", {}, {}),
    ("llama-rope-llama3", {}, {"rope_freqs.weight": llama3_divisors()}),
    ("llama-rope-linear", {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {}),
    (
        "llama-rope-yarn",
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64},
        {},
    ),
    ("mistral", {"attention.sliding_window": 24, "attention.head_count_kv": [4, 4]}, {}),
    ("qwen2", {}, {}),
    ("qwen3", {}, {}),
]


@pytest.mark.parametrize(("name", "metadata", "extra"), GGUF_FORMS)
@pytest.mark.parametrize("shards", [1, 2])
def test_same_arrays_and_shape_as_the_folder(
    name: str,
    metadata: dict[str, Any],
    extra: dict[str, Any],
    shards: int,
    tmp_path: Path,
    tensors: Tensors,
    tiny_checkpoint: Callable[[str], Path],
) -> None:
    folder = load(tiny_checkpoint(name), shards)
    file = load(write_gguf(tmp_path / "model.gguf", name, tensors(name), metadata=metadata, extra=extra), shards)
    for parameter, leaf, other in zip(folder.architecture.parameters, folder.leaves, file.leaves, strict=True):
        np.testing.assert_array_equal(leaf, other, err_msg=str(parameter))
    for field in ("architecture", "num_kv_heads", "head_dim", "vocab_size", "traits", "tie_embeddings", "max_position_embeddings"):
        assert getattr(folder.config, field) == getattr(file.config, field), field
    np.testing.assert_allclose(file.config.rope.frequencies, folder.config.rope.frequencies, rtol=1e-6)
    assert file.config.rope.scale == pytest.approx(folder.config.rope.scale)
    assert file.config.norm_eps == pytest.approx(folder.config.norm_eps)
    assert file.config.eos_token_ids == (EOS, END_OF_TURN)


def test_any_rows_of_any_tensor(tmp_path: Path, tensors: Tensors, monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama's queries and keys lie in another order within their heads of 8; whoever looks for a NaN reads as many rows as are handy."""
    original = {name: tensor.copy() for name, tensor in tensors("llama-bias").items()}
    original[(broken := "model.layers.0.self_attn.q_proj.weight")][9, 5] = np.nan
    path = write_gguf(tmp_path / "model.gguf", "llama-bias", original)
    checkpoint = GGUFCheckpoint(path)
    for name in (broken, "model.layers.1.self_attn.k_proj.bias", "model.layers.0.mlp.up_proj.weight"):
        whole = original[name]
        for rows in (slice(0, 3), slice(5, 21), slice(8, 16), slice(30, len(whole))):
            index = rows, *(slice(2, size) for size in whole.shape[1:])
            np.testing.assert_array_equal(checkpoint.read(name, index), whole[index], err_msg=name)
    monkeypatch.setattr("jaxserve.weights.magnitudes._PIECE_ELEMENTS", 3 * 64)
    with pytest.raises(WeightsError, match=f"infinite or not numbers .NaN., in {broken}$"):
        load(path)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantized_weights(kind: str, tmp_path: Path, tensors: Tensors, caplog: pytest.LogCaptureFixture) -> None:
    """On 2 shards: rows of 96 are cut at 48, within a block of 32. The log tells of types that do not stay quantized."""
    number = GGMLQuantizationType[kind]
    original = tensors("llama")
    with caplog.at_level("INFO", "jaxserve"):
        model = load(write_gguf(tmp_path / "model.gguf", "llama", original, number), 2)
    told = f"model.gguf: matrices of type {kind} are dequantized as they are loaded"
    assert [one for one in caplog.messages if "dequantized" in one] == ([told] if kind in ("Q5_0", "Q5_1") else [])
    leaves = dense_leaves(model, make_mesh(2))
    for name in ("model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.o_proj.weight", "lm_head.weight"):
        np.testing.assert_array_equal(leaves[name], dequantize(quantize(original[name], number), number), err_msg=name)
    q, k, v = (original[f"model.layers.0.self_attn.{n}_proj.weight"] for n in "qkv")
    merged = np.concatenate([q[:32], k[:16], v[:16], q[32:], k[16:], v[16:]])
    loss = np.abs(np.asarray(leaves["model.layers.0.self_attn.q_proj.weight"]) - merged).max()
    assert 0 < loss < {"F16": 1e-3, "BF16": 1e-2, "Q8_0": 1e-2}.get(kind, 0.2)


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ2_XXS", "TQ1_0", "MXFP4"])
def test_other_quantization_types_are_those_of_the_gguf_package(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random blocks, read in chunks of few rows and as part of the columns."""
    monkeypatch.setattr("jaxserve.weights.gguf_file._CHUNK_ELEMENTS", 1024)
    number = GGMLQuantizationType[kind]
    block, size = GGML_QUANT_SIZES[number]
    packed = np.random.default_rng(0).integers(1, 60, (5, 512 // block * size), np.uint8)
    checkpoint = GGUFCheckpoint.__new__(GGUFCheckpoint)
    path = tmp_path / "blocks"
    path.write_bytes(b"x" * 7 + packed.tobytes())
    tensor = GGUFTensor((5, 512), int(number), 7, path)
    whole = dequantize(packed, number)
    np.testing.assert_array_equal(checkpoint._rows(tensor, 1, 5), whole[1:5])


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"attention.head_count_kv": [4, 2]}, "differs between layers"),
        ({"attention.head_count": None}, "head_count"),
        ({"attention.value_length": 4}, "values of another size"),
        ({"rope.dimension_count": 4}, "partial rotary"),
        ({"expert_count": 8}, "mixtures of experts"),
        ({"rope.scaling.type": "longrope", "rope.scaling.factor": 2.0}, "longrope"),
        ({"rope.scaling.type": "yarn"}, "rope.scaling.factor is missing"),
        ({"embedding_length": "wide"}, "embedding_length"),
        ({"block_count": None}, "block_count is missing"),
        ({"block_count": 2**31 - 1}, "2147483647 layers are not supported"),
    ],
)
def test_metadata_that_is_refused(metadata: dict[str, Any], message: str, tmp_path: Path, tensors: Tensors) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        load(write_gguf(tmp_path / "model.gguf", "llama", tensors("llama"), metadata=metadata))


def test_architectures_and_tensors_that_are_not_known(tmp_path: Path, tensors: Tensors) -> None:
    whole = write_gguf(tmp_path / "model.gguf", "llama", tensors("llama"), extra={"blk.0.attn_gate.weight": np.ones(4, np.float32)})
    with pytest.raises(WeightsError, match=r"not part of the model: blk\.0\.attn_gate\.weight"):
        load(whole)
    whole.write_bytes(whole.read_bytes().replace(b"llama", b"bloom"))
    with pytest.raises(UnsupportedModel, match="GGUF architecture 'bloom' is not supported"):
        load(whole)
    with pytest.raises(UnsupportedModel, match=r"GGUF architecture \['llama'\] is not supported"):
        config_of_gguf(GGUFHeader({"general.architecture": ["llama"]}, {}), None)
    few = {name: tensor for name, tensor in tensors("llama").items() if "layers.1.mlp" not in name}
    with pytest.raises(WeightsError, match=r"missing: model\.layers\.1\.mlp"):
        load(write_gguf(tmp_path / "few.gguf", "llama", few))
    wrong = write_gguf(tmp_path / "wrong.gguf", "llama-rope-llama3", tensors("llama"), extra={"rope_freqs.weight": np.ones(3, np.float32)})
    with pytest.raises(UnsupportedModel, match=r"rope_freqs\.weight does not hold 4"):
        load(wrong)


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.001, 0.01, 0.5, 0.999])
def test_truncated_files(share: float, tmp_path: Path, tensors: Tensors) -> None:
    path = write_gguf(tmp_path / "model.gguf", "llama", tensors("llama"))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(WeightsError, match="damaged") as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_what_comes_twice_is_damage(tmp_path: Path, tensors: Tensors) -> None:
    """Which of two is meant nobody knows: tensors or keys of one name, and a tensor under two names."""
    other = np.ones((64, 64), np.float32)
    path = write_gguf(tmp_path / "model.gguf", "llama", tensors("llama"), extra={"model.layers.0.self_attn.q_proj.weight": other})
    with pytest.raises(WeightsError, match="a tensor under two names"):
        load(path)
    for name, twin in ((b"blk.1.attn_q.weight", b"blk.0.attn_q.weight"), (b"llama.rope.freq_base", b"llama.context_length")):
        path = write_gguf(tmp_path / "model.gguf", "llama", tensors("llama"))
        path.write_bytes(path.read_bytes().replace(name, twin))
        with pytest.raises(WeightsError, match="damaged"):
            load(path)


def test_damaged_headers_never_give_a_traceback(tmp_path: Path, tensors: Tensors) -> None:
    """Bytes of the header changed at random, sizes and types among them: the file is read, or one line says what is wrong."""
    path = write_gguf(tmp_path / "model.gguf", "llama-rope-llama3", tensors("llama"), extra={"rope_freqs.weight": llama3_divisors()})
    whole = path.read_bytes()
    header = min(tensor.offset for tensor in GGUFCheckpoint(path).header.tensors.values())
    draw = random.Random(0)
    errors = 0
    for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(draw.choice((1, 1, 2, 20))):
            damaged[draw.randrange(header)] = draw.choice((0, 1, 255, 128, draw.randrange(256)))
        path.write_bytes(damaged)
        try:
            read_config(resolve_model(ModelOptions(model_id=str(path))))
        except StartupError as error:
            assert "\n" not in str(error)
            errors += 1
    assert errors > 100


def split(folder: Path, name: str, tensors: dict[str, np.ndarray], count: int = 3) -> list[Path]:
    """The files of a model as gguf-split --no-tensor-first-split cuts it."""
    (folder / "whole").mkdir()
    whole = write_gguf(folder / "whole" / "model.gguf", name, tensors)
    reader = GGUFReader(whole)
    parts = np.array_split(np.arange(len(reader.tensors)), count - 1)
    paths = [folder / f"Tiny Q4-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]
    for number, path in enumerate(paths):
        writer = GGUFWriter(path, "llama")
        if number == 0:
            for key, field in reader.fields.items():
                if not key.startswith(("GGUF.", "general.architecture")):
                    writer.add_key_value(key, field.contents(), field.types[0])
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for i in parts[number - 1] if number else ():
            writer.add_tensor(reader.tensors[i].name, np.array(reader.tensors[i].data))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths


def test_a_model_in_several_files(tmp_path: Path, tensors: Tensors) -> None:
    """The folder, and each file, mean the whole model; a file that is missing, cut off or of another model is named."""
    first, second, third = split(tmp_path, "llama", tensors("llama"))
    whole = load(tmp_path / "whole" / "model.gguf")
    for path in (tmp_path, third):
        for leaf, other in zip(load(path).leaves, whole.leaves, strict=True):
            np.testing.assert_array_equal(leaf, other)
    source = resolve_model(ModelOptions(model_id=str(tmp_path)))
    assert source.path == first
    before = fingerprint(source)

    good = third.read_bytes()
    for damaged, message in (
        (good[:-2000], "00003-of-00003.gguf is truncated or damaged: "),
        (second.read_bytes(), "00003-of-00003.gguf says that it is file 1 of 3, counted from 0, not 2 of 3"),
        (good.replace(b"split.count", b"split.coun_"), "says that it is file 2 of None"),
        (good.replace(b"blk.1.ffn_up", b"blk.0.ffn_up"), "a tensor is in two of its 3 files"),
        (None, "is the first of 3 files of a model; beside it lacks Tiny Q4-00003-of-00003.gguf"),
    ):
        third.write_bytes(damaged) if damaged is not None else third.unlink()
        with pytest.raises(WeightsError, match=message):
            load(first)
    third.write_bytes(good[:-1] + b"x")
    assert fingerprint(source) != before
    first.write_bytes(first.read_bytes().replace(b"split.tensors.count", b"split.tensors.coun_"))
    load(first)
    first.rename(tmp_path / "other.gguf")
    with pytest.raises(WeightsError, match=r"is one of 3 files of a model, and its name does not end in -00001-of-00003\.gguf"):
        load(tmp_path / "other.gguf")
    with pytest.raises(ModelNotFound, match=r"lacks Tiny Q4-00001-of-00003\.gguf, the first file"):
        load(second)


def test_what_is_counted_in_a_header_is_bounded(tmp_path: Path) -> None:
    """A list of Python's numbers takes many times what it takes in a file."""
    key = struct.pack("<Q", 1) + b"k"
    for element, count in ((0, 1 << 24), (8, 1 << 24), (9, 1 << 60)):
        head = struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + key + struct.pack("<IIQ", 9, element, count)
        path = tmp_path / "model.gguf"
        path.write_bytes(head)
        os.truncate(path, 1 << 30)
        with pytest.raises(WeightsError, match="damaged"):
            read_gguf_header(path)


@pytest.mark.parametrize(
    ("kind", "message"), [(9, "Q8_1 is not supported"), (24, "I8 is not supported"), (99, "unknown quantization type 99")]
)
def test_types_that_cannot_be_read_are_named_at_once(kind: int, message: str, tmp_path: Path, tensors: Tensors) -> None:
    path = write_gguf(tmp_path / "model.gguf", "llama", tensors("llama"))
    name = b"blk.1.ffn_up.weight"
    data = path.read_bytes()
    place = data.index(name) + len(name) + 4 + 2 * 8
    path.write_bytes(data[:place] + struct.pack("<I", kind) + data[place + 4 :])
    with pytest.raises(WeightsError, match=rf"GGUF: blk\.1\.ffn_up\.weight: .*{message}"):
        read_config(resolve_model(ModelOptions(model_id=str(path))))
