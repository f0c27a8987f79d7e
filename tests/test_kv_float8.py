"""KV caches of 8 bits: what is written and read, whose scales count, and how near the logits stay."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain_forward import logits_of, make_mesh
from safetensors.numpy import load_file, save_file
from tiny_models import write_checkpoint

from jaxserve import LLM, SamplingParams
from jaxserve.config import EngineOptions, ModelOptions, check
from jaxserve.engine.start import _check_gpu
from jaxserve.errors import DeviceError, StartupError
from jaxserve.models import Model
from jaxserve.models.kv_scaling import NAMES, is_kv_scale
from jaxserve.pallas_kernels import AttentionMetadata, make_layer_kv, page_dtype, write_kv
from jaxserve.pallas_kernels.float8 import float8_values
from jaxserve.pallas_kernels.layer_kv import FLOAT8, from_pages
from jaxserve.weights import resolve_model
from jaxserve.weights.loader import open_model

E4M3, E5M2 = "float8_e4m3fn", "float8_e5m2"
TOKENS = list(range(5, 45))
PER_HEAD = np.array([0.03, 0.07, 0.02, 0.05], np.float32)  # of the 4 KV heads of "llama"
SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}


def load(folder: Path, kv_dtype: str | None = E4M3, tensor: int = 1) -> Model:
    options, mesh = ModelOptions(model_id=str(folder)), make_mesh(tensor)
    return open_model(resolve_model(options), options, mesh, kv_dtype=kv_dtype).load(mesh)


def with_scales(folder: Path, names: tuple[str, str], keys: Any, values: Any, scheme: Any = None, layers: int = 2) -> Path:
    """A tiny checkpoint whose layers have scales; of config.json's quantization nothing but `kv_cache_scheme`."""
    write_checkpoint(folder, "llama")
    tensors = load_file(folder / "model.safetensors")
    for layer in range(layers):
        scales = zip(names, (keys, values), strict=True)
        tensors |= {f"model.layers.{layer}.{name}": np.array(scale, np.float32) for name, scale in scales}
    save_file(tensors, folder / "model.safetensors")
    if scheme is not None:
        config = json.loads((folder / "config.json").read_text())
        declared = {"quant_method": "compressed-tensors", "format": "naive-quantized", "config_groups": {}}
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": declared | {"kv_cache_scheme": scheme}}))
    return folder


def scales_of(model: Model) -> dict[str, jax.Array]:
    pairs = zip(model.architecture.parameters, model.leaves, strict=True)
    return {parameter.sources[0].name: leaf for parameter, leaf in pairs if is_kv_scale(parameter.sources[0].name)}


@pytest.mark.parametrize("names", NAMES, ids=lambda names: names[0])
def test_scales_by_all_their_names(names: tuple[str, str], tmp_path: Path):
    found = scales_of(load(with_scales(tmp_path / "m", names, 0.25, 0.5)))
    assert set(found) == {f"model.layers.{layer}.{name}" for layer in range(2) for name in names}
    for name, leaf in found.items():
        assert leaf.dtype == jnp.float32
        np.testing.assert_array_equal(leaf, np.full(4, 0.5 if names[1] in name else 0.25, np.float32))


def test_a_cache_of_16_bits_needs_no_scales(tmp_path: Path):
    folder = with_scales(tmp_path / "m", NAMES[0], PER_HEAD, PER_HEAD, {**SCHEME, "num_bits": 4})
    assert not scales_of(load(folder, None)) and not scales_of(load(folder, E5M2))


@pytest.mark.parametrize("dtype, bound", [(E4M3, 0.13), (E5M2, 0.25)])
def test_logits_stay_near(dtype: str, bound: float, tiny_checkpoint: Callable[[str], Path]):
    """The root mean square of the differences, in units of the logits' deviation. The tiny model's attention is sharp on purpose."""
    mesh, model = make_mesh(1), load(tiny_checkpoint("llama"), dtype)
    expected = logits_of(model, mesh, TOKENS, 48)
    difference = logits_of(model, mesh, TOKENS, 48, dtype) - expected
    assert 0.01 < np.sqrt((difference**2).mean()) / expected.std() < bound


def test_logits_with_scales(tmp_path: Path):
    folder = with_scales(tmp_path / "m", NAMES[0], PER_HEAD, PER_HEAD[::-1].reshape(4, 1, 1), {**SCHEME, "strategy": "attn_head"})
    mesh, model = make_mesh(1), load(folder)
    expected = logits_of(load(folder, None), mesh, TOKENS, 48)
    # Pages that round nothing: whatever is divided by a scale is multiplied by it again.
    np.testing.assert_allclose(logits_of(model, mesh, TOKENS, 48), expected, atol=1e-4, rtol=0)
    got = logits_of(model, mesh, TOKENS, 48, E4M3)
    assert 0.01 < np.sqrt(((got - expected) ** 2).mean()) / expected.std() < 0.13
    # Scales that are much too small cut keys and values off: finite, and far away.
    scales = set(scales_of(model))
    small = [
        leaf / 16 if p.sources[0].name in scales else leaf for p, leaf in zip(model.architecture.parameters, model.leaves, strict=True)
    ]
    far = logits_of(replace(model, leaves=tuple(small)), mesh, TOKENS, 48, E4M3)
    assert np.isfinite(far).all() and np.sqrt(((far - expected) ** 2).mean()) / expected.std() > 0.3
    # Each device has the scales of its heads.
    sharded = load(folder, tensor=4)
    keys = scales_of(sharded)["model.layers.1.self_attn.k_scale"]
    assert [float(shard.data[0]) for shard in keys.addressable_shards] == PER_HEAD.tolist()
    np.testing.assert_allclose(logits_of(sharded, make_mesh(4), TOKENS, 48, E4M3), got, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "scale, scheme, layers, message",
    [
        ([0.1, 0.2], SCHEME, 2, "k_scale has 2 numbers, not 1 or 4"),
        (0.0, None, 2, "k_scale has scales that are not numbers above zero"),
        (float("nan"), None, 2, "k_scale has scales that are not numbers above zero"),
        (3e38, None, 2, r"k_scale has a scale outside 1e-16 to 1e\+06"),
        (1e-40, None, 2, "k_scale has a scale outside"),
        (0.1, None, 1, "missing: model.layers.1.self_attn.k_scale"),
        (0.1, SCHEME, 0, "none of the scales"),
        (0.1, {**SCHEME, "type": "int"}, 2, "8 bits of type 'int' are not supported"),
        (0.1, {**SCHEME, "symmetric": False}, 2, "zero points are not supported"),
        (0.1, {**SCHEME, "strategy": "token"}, 2, "strategy 'token' is not supported"),
        (0.1, 8, 2, "kv_cache_scheme must be an object"),
    ],
)
def test_scales_that_make_no_sense(scale: Any, scheme: Any, layers: int, message: str, tmp_path: Path):
    folder = with_scales(tmp_path / "m", NAMES[0], scale, scale, scheme, layers)
    with pytest.raises(StartupError, match=message) as error:
        load(folder)
    assert "\n" not in str(error.value)


def test_names_of_the_flag():
    dtypes = {name: EngineOptions(kv_cache_dtype=name).kv_dtype for name in ("auto", "fp8", "fp8_e4m3", "fp8_e4m3fn", "fp8_e5m2")}
    assert dtypes == {"auto": None, "fp8": E4M3, "fp8_e4m3": E4M3, "fp8_e4m3fn": E4M3, "fp8_e5m2": E5M2}
    with pytest.raises(StartupError, match=r"--kv-cache-dtype must be one of auto, fp8, .* Given: int8"):
        check(EngineOptions(kv_cache_dtype="int8"))


def test_a_gpu_that_lacks_a_capability_is_told():
    def mesh(capability: str) -> SimpleNamespace:
        return SimpleNamespace(devices=np.array([SimpleNamespace(device_kind="Tesla T4", compute_capability=capability)]))

    turing, old, new = map(mesh, ("7.5", "8.6", "8.9"))
    _check_gpu(E4M3, new)  # type: ignore[arg-type]
    _check_gpu(E5M2, old)  # type: ignore[arg-type]
    with pytest.raises(StartupError, match=r"needs a GPU of compute capability 8.9 or later, this one is of 8.6; fp8_e5m2 serves it"):
        _check_gpu(E4M3, old)  # type: ignore[arg-type]
    with pytest.raises(DeviceError, match=r"^Tesla T4 is a GPU of compute capability 7.5, and 8.0 or later is needed"):
        _check_gpu(None, turing)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_pages_hold_the_nearest_codes(dtype: str, platform: str):
    """On a CPU pages are bytes, because XLA would widen a float8 cache as a whole to write a token: no temporary may be as large as it."""
    float8 = jnp.dtype(dtype)
    pages = page_dtype(float8, platform)
    assert pages.itemsize == 1 and (pages in FLOAT8) == (platform == "gpu")
    unused, largest = jnp.zeros((1,), jnp.int32), float(jnp.finfo(float8).max)
    metadata = AttentionMetadata(unused[None], unused, unused, jnp.array([1, 9], jnp.int32), jnp.array([3, 0], jnp.int32))
    new = jnp.array([[[1.03, -0.01, 3 * largest, -3 * largest]], [[1.0, 1.0, 1.0, 1.0]]])
    scales = jnp.array([0.5]), jnp.array([2.0])
    write = jax.jit(write_kv, donate_argnums=0)
    keys, values = write(make_layer_kv(4, 8, 1, 4, pages), new, new, metadata, scales)
    for written, scale in ((keys, 0.5), (values, 2.0)):
        expected = np.clip(np.asarray(new[0, 0]) / scale, -largest, largest).astype(float8).astype(np.float32)
        np.testing.assert_array_equal(from_pages(written, jnp.dtype(jnp.float32))[1, 0, 3], expected)
        assert np.count_nonzero(from_pages(written, jnp.dtype(jnp.float32))) == 4  # the token of page 9 is padding
    if platform == "cpu":
        shapes = jax.eval_shape(lambda: make_layer_kv(4096, 8, 1, 4, pages)), new, new, metadata, scales
        analysis = write.lower(*shapes).compile().memory_analysis()
        assert analysis is not None and analysis.temp_size_in_bytes < 4096


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_all_codes_have_their_values(dtype: str):
    float8 = jnp.dtype(dtype)
    codes = np.arange(256, dtype=np.uint8)
    expected = codes.view(float8).astype(np.float32)
    numbers = np.isfinite(expected)
    for stored in (codes, codes.view(np.int8)):
        np.testing.assert_array_equal(np.asarray(float8_values(jnp.asarray(stored), float8))[numbers], expected[numbers])


def test_an_engine_with_a_cache_of_8_bits(tmp_path: Path):
    """Chunks, decodes and prefix hits read what a whole prompt at once would; rounding at a border between two codes differs at most."""
    folder = with_scales(tmp_path / "m", NAMES[0], PER_HEAD, PER_HEAD)
    limits = dict(max_batch_size=2, max_batch_prefill_tokens=32, max_total_tokens=128, cpu_kv_cache_gib=0.001, page_size=8)
    with LLM(str(folder), kv_cache_dtype="fp8_e4m3fn", disable_grammar_support=True, **limits) as llm:
        assert llm.info.kv_cache_dtype == "fp8_e4m3fn"
        assert llm.info.weight_bytes == sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())
        plan = llm.engines[0]._runner._plan
        assert plan.dtype == jnp.uint8 and plan.nbytes == plan.num_pages[0] * 2 * 2 * 8 * 4 * 8  # layers, K and V, tokens, heads, sizes
        params = SamplingParams(temperature=0.0, max_tokens=6, logprobs=0, ignore_eos=True)
        first = llm.generate([TOKENS], params)[0]
        again = llm.generate([TOKENS], params)[0]
        assert again.num_cached_tokens >= 32
        stats = llm.engines[0].stats()
    assert stats.compile_events == 0
    whole = TOKENS + first.outputs[0].token_ids
    logits = logits_of(load(folder), make_mesh(1), whole, 48, E4M3)
    expected = logits - np.log(np.exp(logits.astype(np.float64)).sum(axis=1, keepdims=True))
    for output in (first, again):
        assert output.outputs[0].token_ids == whole[len(TOKENS) :]
        for i, logprobs in enumerate(output.outputs[0].logprobs):
            position = len(TOKENS) - 1 + i
            assert abs(logprobs.raw - expected[position, whole[position + 1]]) < 0.15
