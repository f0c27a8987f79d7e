"""How memory becomes pages."""

from dataclasses import replace

import jax.numpy as jnp
import psutil
import pytest

from jaxserve.errors import DeviceError
from jaxserve.models import ModelConfig
from jaxserve.runner import RunnerConfig, make_mesh
from jaxserve.runner.kv_cache import plan_kv_cache
from jaxserve.runner.memory import kv_cache_bytes

FLOAT32 = jnp.dtype(jnp.float32)
CONFIG = RunnerConfig(max_batch_size=8, max_batch_tokens=64, page_size=16)
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 512,
}
MODEL = ModelConfig.from_hf(LLAMA)
WINDOWS = ModelConfig.from_hf(
    {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1}
)
PAGE = 3 * 2 * 16 * 2 * 8 * 4  # bytes of a page: layers, K and V, tokens, heads, head size, float32


def test_memory_becomes_pages():
    plan = plan_kv_cache(MODEL, CONFIG, 1, FLOAT32, 100 * PAGE + 7)
    assert (plan.num_pages, plan.max_total_tokens, plan.nbytes) == ((100,), 512, 100 * PAGE)


def test_a_context_that_does_not_fit_becomes_what_fits():
    assert plan_kv_cache(MODEL, CONFIG, 1, FLOAT32, 20 * PAGE).max_total_tokens == 20 * 16


def test_a_wanted_context_that_does_not_fit_is_refused():
    with pytest.raises(DeviceError, match=r"400 tokens needs .* MiB of KV cache, there are .* \(320 tokens\)"):
        plan_kv_cache(MODEL, replace(CONFIG, max_total_tokens=400), 1, FLOAT32, 20 * PAGE)
    with pytest.raises(DeviceError):
        plan_kv_cache(MODEL, CONFIG, 1, FLOAT32, PAGE - 1)


def test_a_context_is_never_longer_than_the_model():
    assert plan_kv_cache(MODEL, replace(CONFIG, max_total_tokens=4096), 1, FLOAT32, 100 * PAGE).max_total_tokens == 512


def test_no_more_pages_than_all_slots_can_fill():
    assert plan_kv_cache(MODEL, CONFIG, 1, FLOAT32, 10**9).num_pages == (8 * 512 // 16,)


def test_a_window_needs_few_pages():
    plan = plan_kv_cache(WINDOWS, CONFIG, 1, FLOAT32, 10**9)
    assert plan.windows == (None, 32)
    assert plan.num_pages == (8 * 32, 8 * (2 + 4 + 2))
    small = plan_kv_cache(WINDOWS, CONFIG, 1, FLOAT32, 40 * PAGE)
    assert small.nbytes <= 40 * PAGE
    assert small.num_pages[1] >= 8 and small.num_pages[0] * 16 >= small.max_total_tokens


def test_shards_hold_their_own_heads_or_share_one():
    assert plan_kv_cache(MODEL, CONFIG, 2, FLOAT32, 100 * PAGE).num_pages == (200,)
    assert plan_kv_cache(MODEL, CONFIG, 4, FLOAT32, 100 * PAGE).num_pages == (200,)


def test_a_cpu_keeps_half_of_what_is_available(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000})())
    assert kv_cache_bytes(make_mesh(1), 10**9, 0) == 500
    assert kv_cache_bytes(make_mesh(2), 10**9, 0) == 250
    assert kv_cache_bytes(make_mesh(1), 100, 0) == 100
    assert kv_cache_bytes(make_mesh(2), 10**9, 100) == 200
    with pytest.raises(DeviceError, match="no memory"):
        kv_cache_bytes(make_mesh(1), None, 1000)
