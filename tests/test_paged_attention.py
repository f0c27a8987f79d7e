"""Paged attention: each implementation against the plain specification, over named shapes."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_specs import SMALL, ArgSpec

from jaxserve.pallas_kernels import AttentionMetadata, LayerKV, make_layer_kv, paged_attention, plan_attention, write_kv
from jaxserve.pallas_kernels.gpu import Gpu
from jaxserve.pallas_kernels.paged_attention import api
from jaxserve.pallas_kernels.paged_attention.reference import paged_attention_reference

SCALE = 0.3


@partial(jax.jit, static_argnames=("window", "soft_cap"))
def planned_attention(q: jax.Array, kv: LayerKV, metadata: AttentionMetadata, window: int | None, soft_cap: float | None) -> jax.Array:
    metadata = plan_attention(metadata, q, kv, window=window)
    return paged_attention(q, kv, metadata, scale=SCALE, window=window, soft_cap=soft_cap)


reference_attention = jax.jit(partial(paged_attention_reference, scale=SCALE), static_argnames=("window", "soft_cap"))


def attend(attention: Callable[..., jax.Array], spec: ArgSpec, dtype: str = "float32") -> np.ndarray:
    """What an implementation makes of a spec's arrays, without padding tokens; the padding must be finite."""
    out = np.asarray(attention(*spec.make(jnp.dtype(dtype)), window=spec.window, soft_cap=spec.soft_cap))
    assert out.dtype == dtype and np.isfinite(out.astype(np.float32)).all()
    return out[: spec.num_real_tokens]


@pytest.mark.parametrize("name", SMALL)
def test_it_is_what_the_specification_says(name: str):
    expected = attend(reference_attention, SMALL[name])
    np.testing.assert_allclose(attend(planned_attention, SMALL[name]), expected, atol=2e-6, rtol=1e-5)


def test_the_specification_is_softmax_attention():
    """The reference itself, against loops in numpy."""
    spec = SMALL["window"]
    q, (keys, values), metadata = (jax.tree.map(np.asarray, x) for x in spec.make(jnp.dtype(jnp.float32)))
    expected, token = [], 0
    for row, (num_tokens, length) in enumerate(spec.rows):
        pages = metadata.page_table[row]
        places = [(pages[p // spec.page_size], p % spec.page_size) for p in range(length)]
        for position in range(length - num_tokens, length):
            seen = places[max(0, position + 1 - (spec.window or length)) : position + 1]
            for head in range(spec.num_heads):
                k = np.stack([keys[page, head // 3, offset] for page, offset in seen])
                v = np.stack([values[page, head // 3, offset] for page, offset in seen])
                weights = np.exp(SCALE * (k @ q[token, head]))
                expected.append(weights @ v / weights.sum())
            token += 1
    np.testing.assert_allclose(attend(reference_attention, spec).reshape(-1, spec.head_dim), np.stack(expected), atol=2e-6, rtol=1e-4)


def test_a_plan_made_beforehand_changes_nothing():
    spec = SMALL["decode, window"]
    unplanned = jax.jit(partial(paged_attention, scale=SCALE), static_argnames=("window", "soft_cap"))
    np.testing.assert_array_equal(attend(planned_attention, spec), attend(unplanned, spec))


def test_bfloat16_stays_bfloat16():
    spec = SMALL["soft cap, one KV head"]
    expected = attend(reference_attention, spec)
    np.testing.assert_allclose(attend(planned_attention, spec, "bfloat16").astype(np.float32), expected, atol=0.05)


@pytest.mark.parametrize(
    ("implementation", "dtype", "gpu", "sizes", "refusal"),
    [
        ("triton", "bfloat16", None, {}, "triton needs an NVIDIA GPU; this process computes on: cpu"),
        ("mosaic", "float32", Gpu(132, True), {}, "mosaic computes bfloat16 and float16, not float32"),
        ("mosaic", "bfloat16", Gpu(108, False), {}, "mosaic needs a Hopper GPU"),
        ("mosaic", "bfloat16", Gpu(132, True), {"head_dim": 96}, "mosaic does not go with 32 heads, 8 KV heads of 96"),
        ("mosaic", "bfloat16", Gpu(132, True), {"page_size": 48}, "pages of 48 tokens"),
        ("mosaic", "bfloat16", Gpu(132, True), {}, None),
        ("triton", "float16", Gpu(108, False), {"head_dim": 96}, None),
        ("xla", "float32", None, {}, None),
        ("auto", "float32", None, {}, None),
    ],
)
def test_an_implementation_that_cannot_serve_is_refused(
    implementation: str, dtype: str, gpu: Gpu | None, sizes: dict[str, int], refusal: str | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(api, "local_gpu", lambda: gpu)
    sizes = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "page_size": 16} | sizes
    if refusal is None:
        api.check_implementation(implementation, jnp.dtype(dtype), None, **sizes)
        return
    with pytest.raises(ValueError, match=refusal):
        api.check_implementation(implementation, jnp.dtype(dtype), None, **sizes)


def test_the_implementation_chooses_the_kernels(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(api, "local_gpu", lambda: Gpu(132, True))
    chosen = {name: api.chosen_gpu(name) for name in api.IMPLEMENTATIONS}
    assert chosen["auto"] == Gpu(132, True) and chosen["xla"] is None
    assert chosen["triton"] == Gpu(132, False) and chosen["mosaic"] == Gpu(132, True, only_mosaic=True)


@pytest.mark.parametrize("change", [{"num_kv_heads": 4}, {"head_dim": 8}])
def test_shapes_that_do_not_fit_are_refused(change: dict[str, int]):
    spec = ArgSpec(6, 2, 16, ((1, 20),))
    q, _, metadata = spec.make(jnp.dtype(jnp.float32))
    sizes = {"num_kv_heads": spec.num_kv_heads, "head_dim": spec.head_dim, **change}
    kv = make_layer_kv(4, 16, sizes["num_kv_heads"], sizes["head_dim"], jnp.dtype(jnp.float32))
    with pytest.raises(ValueError, match="query heads"):
        paged_attention(q, kv, metadata, scale=1.0, window=None, soft_cap=None)


def test_written_keys_and_values_are_attended_to():
    """Write a prompt in two steps, padding in each, and attend as if it had always been there."""
    num_pages, page_size, num_tokens = 6, 4, 15
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(num_tokens, 2, 8)), jnp.float32) for _ in range(3))
    table = jnp.array([[4, 0, 3, 5]], jnp.int32)
    kv, outs = make_layer_kv(num_pages, page_size, 2, 8, jnp.dtype(jnp.float32)), []
    attend = jax.jit(partial(paged_attention, scale=SCALE, window=None, soft_cap=None))
    for begin, end in ((0, 9), (9, 15)):
        position = jnp.arange(begin, end + 2, dtype=jnp.int32)  # two padding tokens
        metadata = AttentionMetadata(
            page_table=table,
            kv_lens=jnp.array([end], jnp.int32),
            query_starts=jnp.array([0, end - begin], jnp.int32),
            write_pages=jnp.where(position < end, table[0, jnp.minimum(position, end - 1) // page_size], num_pages),
            write_offsets=position % page_size,
        )
        chunk = [jnp.pad(x[begin:end], ((0, 2), (0, 0), (0, 0)), constant_values=50.0) for x in (q, k, v)]
        kv = write_kv(kv, chunk[1], chunk[2], metadata)
        outs.append(np.asarray(attend(chunk[0], kv, metadata))[: end - begin])
    scores = SCALE * jnp.einsum("qhd,khd->hqk", q, k)
    causal = jnp.tril(jnp.ones((num_tokens, num_tokens), jnp.bool_))
    expected = jnp.einsum("hqk,khd->qhd", jax.nn.softmax(jnp.where(causal[None], scores, -jnp.inf), axis=-1), v)
    np.testing.assert_allclose(np.concatenate(outs), expected, atol=2e-6, rtol=1e-5)


def test_writing_donated_pages_copies_nothing():
    spec = SMALL["mixed"]
    q, kv, metadata = spec.make(jnp.dtype(jnp.float32))

    def step(q: jax.Array, kv: LayerKV, metadata: AttentionMetadata) -> tuple[jax.Array, LayerKV]:
        kv = write_kv(kv, q[:, :2], q[:, :2], metadata)
        return paged_attention(q, kv, metadata, scale=SCALE, window=None, soft_cap=None), kv

    hlo = str(jax.jit(step, donate_argnums=1).lower(q, kv, metadata).compile().as_text())
    shape = ",".join(map(str, kv[0].shape))
    assert f"f32[{shape}]" in hlo
    assert not [line for line in hlo.splitlines() if f"= f32[{shape}]" in line and " copy(" in line]
