"""Every family against transformers (tests/goldens/models.json), on one device and sharded."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from plain_forward import logits_of, make_mesh
from tiny_models import CONFIGS

from jaxserve.config import ModelOptions
from jaxserve.models import Model
from jaxserve.weights import resolve_model
from jaxserve.weights.loader import load_model

GOLDENS: dict[str, list[dict[str, Any]]] = json.loads((Path(__file__).parent / "goldens" / "models.json").read_text())
BUCKET = 160
SHARDED = [
    *(("llama-bias", 2), ("llama", 4), ("llama-mha-tied", 8)),
    *(("mistral", 2), ("mistral", 4), ("mistral", 8)),
    *(("qwen2", 2), ("qwen2-windows", 4), ("qwen2", 8)),
    *(("qwen3", 2), ("qwen3-bias", 4), ("qwen3", 8)),
]


def load(folder: Path, tensor: int, dtype: str = "auto") -> Model:
    options = ModelOptions(model_id=str(folder), dtype=dtype)
    return load_model(resolve_model(options), options, make_mesh(tensor))


def check_golden(model: Model, golden: dict[str, Any], tensor: int) -> None:
    """All tokens at once: fed with the golden ones, each position must choose the next."""
    prompt, tokens = golden["prompt"], golden["tokens"]
    logits = logits_of(model, make_mesh(tensor), prompt + tokens[:-1], BUCKET)[len(prompt) - 1 :]
    assert logits.argmax(axis=1).tolist() == tokens
    np.testing.assert_allclose(logits[-1], golden["last_logits"], atol=1e-4, rtol=0)
    wide = logits.astype(np.float64)
    logprobs = wide - np.log(np.exp(wide - wide.max(axis=1, keepdims=True)).sum(axis=1, keepdims=True)) - wide.max(axis=1, keepdims=True)
    np.testing.assert_allclose(logprobs[range(len(tokens)), tokens], golden["logprobs"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_and_logits_equal_transformers(name: str, tiny_checkpoint: Callable[[str], Path]) -> None:
    model = load(tiny_checkpoint(name), 1)
    for golden in GOLDENS[name]:
        check_golden(model, golden, 1)


@pytest.mark.parametrize(("name", "tensor"), SHARDED)
def test_tensor_parallel_equals_transformers(name: str, tensor: int, tiny_checkpoint: Callable[[str], Path]) -> None:
    """Every family on 2, 4 and 8 devices; among them biases, repeated KV heads (2 on 4 shards, 4 on 8), windows, and a vocabulary that the
    shards do not divide (tied, 8 shards)."""
    check_golden(load(tiny_checkpoint(name), tensor), GOLDENS[name][1], tensor)


@pytest.mark.parametrize(("name", "tensor", "bound"), [("llama", 1, 5e-3), ("llama-bias", 1, 7e-3), ("llama", 2, 9e-3)])
def test_bfloat16_is_near_float32(name: str, tensor: int, bound: float, tiny_checkpoint: Callable[[str], Path]) -> None:
    """The same numbers as weights. On one device the residual stream is float32, so that the error is smaller than on two."""
    model, mesh = load(tiny_checkpoint(name), tensor, "bfloat16"), make_mesh(tensor)
    wide = Model(model.architecture, tuple(leaf.astype(jnp.float32) for leaf in model.leaves), jnp.dtype(jnp.float32))
    tokens = GOLDENS[name][0]["prompt"] + GOLDENS[name][0]["tokens"]
    logits, expected = (logits_of(of, mesh, tokens, BUCKET, kv_dtype=str(of.kv_dtype)) for of in (model, wide))
    error = np.linalg.norm(logits - expected) / np.linalg.norm(expected)
    assert 1e-4 < error < bound


def test_goldens_can_fail() -> None:
    assert set(GOLDENS) == set(CONFIGS)
    for goldens in GOLDENS.values():
        for golden in goldens:
            assert len(golden["tokens"]) == 48
            assert len(set(golden["tokens"])) >= 20
            assert golden["margin"] > 1e-3
