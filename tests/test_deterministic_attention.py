"""Attention of deterministic steps: a token's bits are the same wherever it stands, whatever stands beside it, alone and in a chunk."""

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.triton import lowering as triton_lowering
from jax.sharding import AbstractDevice, AbstractMesh

from jaxserve.pallas_kernels import AttentionMetadata, plan_attention
from jaxserve.pallas_kernels.gpu import Gpu
from jaxserve.pallas_kernels.paged_attention import api
from jaxserve.pallas_kernels.paged_attention.gpu import paged_attention_gpu
from jaxserve.pallas_kernels.paged_attention.reference import paged_attention_reference
from jaxserve.pallas_kernels.paged_attention.split_plan import SplitPlan
from jaxserve.pallas_kernels.paged_attention.triton_deterministic import DeterministicConfig, deterministic_attention_triton
from jaxserve.pallas_kernels.paged_attention.xla import paged_attention_xla
from jaxserve.pallas_kernels.paged_attention.xla_plan import plan_xla

UNOPTIMISED = {"xla_backend_optimization_level": 0}  # compiling an interpreted kernel takes longer than running it
BF16, F16, FLOAT8 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16), jnp.dtype(jnp.float8_e4m3fn)
NUM_TOKENS, NUM_ROWS, PAGES, PAGE_SIZE = 48, 6, 14, 16
# Rows of (first token, end) of four texts, in four steps of one shape: prompts whole, in other chunks, token by token, in another order.
STEPS = [
    [(0, 0, 20), (1, 190, 217), (2, 40, 41)],
    [(2, 40, 41), (1, 190, 199), (0, 3, 20), (3, 0, 9)],
    [(1, 199, 217), (3, 100, 128), (0, 2, 3)],
    [(0, 19, 20), (1, 216, 217), (1, 198, 199), (3, 127, 128), (0, 2, 3), (1, 195, 196)],
]


class Texts:
    """Keys, values and queries of every position of four texts, so that a step may hold any part of them."""

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int, dtype: jnp.dtype, kv_dtype: jnp.dtype):
        rng = np.random.default_rng(0)
        self.queries = rng.standard_normal((4, PAGES * PAGE_SIZE, num_heads, head_dim))
        self.tables = rng.permutation(4 * PAGES).reshape(4, PAGES)
        pages = rng.standard_normal((2, 4 * PAGES, num_kv_heads, PAGE_SIZE, head_dim))
        self.kv = (jnp.asarray(pages[0], jnp.float32).astype(kv_dtype), jnp.asarray(pages[1], jnp.float32).astype(kv_dtype))
        self.dtype = dtype

    def step(self, rows: list[tuple[int, int, int]]) -> tuple[jax.Array, Any, AttentionMetadata]:
        """A step of the one shape: its last rows and tokens are padding."""
        q = np.full((NUM_TOKENS, *self.queries.shape[2:]), 7.0)
        tokens = [self.queries[text, begin:end] for text, begin, end in rows]
        q[: sum(map(len, tokens))] = np.concatenate(tokens)
        padding = NUM_ROWS - len(rows)
        unused = jnp.zeros((NUM_TOKENS,), jnp.int32)
        metadata = AttentionMetadata(
            jnp.asarray([*(self.tables[text] for text, _, _ in rows), *[self.tables[0]] * padding], jnp.int32),
            jnp.asarray([*(end for _, _, end in rows), *[0] * padding], jnp.int32),
            jnp.asarray(np.cumsum([0, *(end - begin for _, begin, end in rows), *[0] * padding]), jnp.int32),
            unused,
            unused,
            deterministic=True,
        )
        return jnp.asarray(q, jnp.float32).astype(self.dtype), self.kv, metadata


def check(attention: Any, texts: Texts, tolerance: float, **options: Any) -> None:
    """Every token of STEPS is near the reference, and has the same bits in each step that it is part of."""
    seen: dict[tuple[int, int], bytes] = {}
    num_again = 0
    for rows in STEPS:
        q, kv, metadata = texts.step(rows)
        out = np.asarray(attention(q, kv, metadata))
        assert np.isfinite(out.astype(np.float32)).all()
        places = [(text, position) for text, begin, end in rows for position in range(begin, end)]
        expected = jax.jit(functools.partial(paged_attention_reference, **options))(q.astype(jnp.float32), kv, metadata)
        expected = np.asarray(expected)[: len(places)]
        error = np.linalg.norm(out[: len(places)].astype(np.float32) - expected) / np.linalg.norm(expected)
        assert error < tolerance
        for place, row in zip(places, out, strict=False):
            num_again += place in seen
            assert seen.setdefault(place, row.tobytes()) == row.tobytes(), f"text and position {place} in {rows}"
    assert num_again > 40


CASES = {
    "two splits a group": (8, 2, 64, F16, dict(window=None, soft_cap=None), 32, 64, 64),
    "a window and a cap, groups of 3": (3, 1, 96, BF16, dict(window=37, soft_cap=20.0), 32, 32, 16),
    "float8": (2, 2, 64, FLOAT8, dict(window=100, soft_cap=None), 16, 1024, 32),
}


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_is_the_reference_and_gives_a_token_the_same_bits_anywhere(name: str):
    num_heads, num_kv_heads, head_dim, kv_dtype, options, block_kv, split_tokens, lanes = CASES[name]
    options = options | {"scale": head_dim**-0.5}
    config = DeterministicConfig(block_kv, split_tokens, 4, 3, num_workers=5, tile_lanes=lanes)

    def call(q: jax.Array, kv: Any, metadata: AttentionMetadata) -> jax.Array:
        plan = config.plan(metadata, q, kv, options["window"])
        return deterministic_attention_triton(q, kv, metadata, plan=plan, config=config, out_dtype=BF16, interpret=True, **options)

    texts = Texts(num_heads, num_kv_heads, head_dim, BF16 if kv_dtype == BF16 else F16, kv_dtype)
    check(jax.jit(call, compiler_options=UNOPTIMISED), texts, 4e-3, **options)


@pytest.mark.parametrize("head_dim, window", [(8, 37), (64, None)])
def test_xla_gives_a_token_the_same_bits_anywhere(head_dim: int, window: int | None):
    options = dict(scale=head_dim**-0.5, window=window, soft_cap=None)

    def attend(q: jax.Array, kv: Any, metadata: AttentionMetadata) -> jax.Array:
        return paged_attention_xla(q, kv, plan_xla(metadata, page_size=PAGE_SIZE, window=window), **options)

    check(jax.jit(attend), Texts(6, 2, head_dim, jnp.dtype(jnp.float32), jnp.dtype(jnp.float32)), 1e-5, **options)


@pytest.mark.parametrize("num_heads, head_dim, kv_dtype, window", [(32, 128, F16, None), (32, 256, BF16, 1024), (24, 96, FLOAT8, None)])
def test_the_kernel_lowers_for_cuda(num_heads: int, head_dim: int, kv_dtype: Any, window: int | None, monkeypatch: pytest.MonkeyPatch):
    """At serving sizes; Triton's verifier finds what its compiler would refuse."""
    lower, modules = triton_lowering.lower_jaxpr_to_triton_module, []
    monkeypatch.setattr(
        triton_lowering, "lower_jaxpr_to_triton_module", lambda *args, **kwargs: modules.append(lower(*args, **kwargs)) or modules[-1]
    )
    num_rows, num_tokens = 256, 512
    shapes = (num_rows, 8192), num_rows, num_rows + 1, num_tokens, num_tokens
    arrays = [jax.ShapeDtypeStruct(shape if isinstance(shape, tuple) else (shape,), jnp.int32) for shape in shapes]
    metadata = AttentionMetadata(*arrays, deterministic=True)  # pyright: ignore[reportArgumentType]
    pages = jax.ShapeDtypeStruct((4096, 8, 16, head_dim), kv_dtype)
    q = jax.ShapeDtypeStruct((num_tokens, num_heads, head_dim), BF16 if kv_dtype == BF16 else F16)
    options: Any = dict(scale=head_dim**-0.5, window=window, soft_cap=None, out_dtype=BF16)
    call = functools.partial(paged_attention_gpu, gpu=Gpu(132, is_hopper=True), **options)
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Pallas-Triton is deprecated; nothing else serves GPUs before sm_90
        text = jax.jit(call).trace(q, (pages, pages), metadata).lower(lowering_platforms=("cuda",)).as_text()
    monkeypatch.setattr(api, "local_gpu", lambda: Gpu(132, is_hopper=True))
    planned = jax.eval_shape(functools.partial(plan_attention, window=window), metadata, q, (pages, pages))
    assert isinstance(planned.plan, SplitPlan)  # laid out once for all layers, as every step
    assert "paged_deterministic_combine" in text and "mosaic_gpu" not in text
    assert [module.module.operation.verify() for module in modules] == [True, True]
