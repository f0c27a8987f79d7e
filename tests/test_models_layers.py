"""The parts of the decoder by themselves, against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxserve.models.formats import DenseFormat, Quantization, matrices
from jaxserve.models.layers import Branch, Linear, Place, RMSNorm
from jaxserve.models.parameters import Axis, Source
from jaxserve.pallas_kernels import Shards


def dense(weight: np.ndarray) -> DenseFormat:
    rows, columns = weight.shape
    module = DenseFormat((Source("weight", (Axis("outputs", rows), Axis("inputs", columns))),))
    nnx.update(module, {"weight": jnp.asarray(weight)})
    return module


@pytest.mark.parametrize("tokens", [1, 7, 8, 32, 33])
def test_product_whatever_the_number_of_tokens(tokens: int) -> None:
    """Either order of the operands gives x times the transposed matrix."""
    random = np.random.default_rng(0)
    x, weight = random.standard_normal((tokens, 24)).astype(np.float32), random.standard_normal((40, 24)).astype(np.float32)
    out = jax.jit(lambda x: dense(weight).matmul(x))(x)
    assert out.shape == (tokens, 40)
    np.testing.assert_allclose(out, x @ weight.T, atol=1e-5)


def test_half_precision_is_summed_and_returned_as_asked() -> None:
    x, weight = jnp.ones((2, 1024), jnp.bfloat16), jnp.full((3, 1024), 1.0078125, jnp.bfloat16)
    assert dense(np.asarray(weight)).matmul(x).dtype == jnp.bfloat16
    wide = dense(np.asarray(weight)).matmul(x, jnp.dtype(jnp.float32))
    assert wide.dtype == jnp.float32
    np.testing.assert_array_equal(wide, np.full((2, 3), 1032.0, np.float32))


def test_norm_is_computed_in_float32() -> None:
    """In bfloat16 the mean square of these would lose what distinguishes them."""
    norm = RMSNorm("norm", 512, 1e-5)
    nnx.update(norm, {"weight": jnp.full(512, 2.0, jnp.bfloat16)})
    x = np.linspace(-3, 3, 512, dtype=np.float32)[None, :]
    out, total = norm(Branch(jnp.asarray(x, jnp.bfloat16)), jnp.zeros((1, 512), jnp.bfloat16), Shards())
    assert out.dtype == total.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(np.float32), 2 * x / np.sqrt(np.square(x).mean() + 1e-5), rtol=0.01)


def test_nothing_is_added_where_the_product_has_added_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same stream and the same norm, whoever adds."""
    random = np.random.default_rng(0)
    x, weight, residual = (random.standard_normal(shape).astype(np.float32) for shape in ((3, 24), (40, 24), (3, 40)))
    linear = Linear(("down",), (Axis("hidden", 40),), Axis("inputs", 24), False, Place(Quantization(), ""))
    nnx.update(linear, {"matrix": {"weight": jnp.asarray(weight)}})
    norm = RMSNorm("norm", 40, 1e-5)
    nnx.update(norm, {"weight": jnp.ones(40, jnp.float32)})
    left = norm(*linear.branch(jnp.asarray(x), jnp.asarray(residual), Shards()), Shards())
    monkeypatch.setattr(matrices, "add_matmul", lambda x, weight, residual, fixed_order: residual + x @ weight.T)
    branch, stream = linear.branch(jnp.asarray(x), jnp.asarray(residual), Shards())
    assert branch.parts is None
    np.testing.assert_allclose(branch.added_to(stream, Shards()), residual + x @ weight.T, atol=1e-5)
    for found, expected in zip(norm(branch, stream, Shards()), left, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)
