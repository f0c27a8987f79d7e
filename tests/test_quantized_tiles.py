"""Quantized weights in tiles, as a CPU multiplies them: the same elements, bit for bit, and the same products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.pallas_kernels import Layout, pack, quantized_matmul, weight_of
from jaxserve.pallas_kernels.quantized_matmul import tiled
from jaxserve.pallas_kernels.quantized_matmul.tiled import FEW_TOKENS, TiledWeight

ROWS, COLUMNS = 192, 96
LAYOUTS = {
    "Q4_0": Layout("int4", 32, scale_dtype="float16"),
    "Q4_1": Layout("uint4", 32, "minimum", scale_dtype="float16"),
    "Q6_K": Layout("int8", 16),
    "Q5_K": Layout("int8", 32, "minimum"),
    "GPTQ": Layout("int4", 48, "zero", "float16"),
    "a row": Layout("int8"),
}


def unpacked(layout: Layout, rows: int = ROWS, columns: int = COLUMNS) -> dict[str, jax.Array]:
    random = np.random.default_rng(1)
    low, high = {"int4": (-8, 8), "uint4": (0, 16)}.get(layout.code, (-127, 128))
    made: dict[str, jax.Array] = {}
    for name, shape in layout.unpacked_shapes(rows, columns).items():
        values = random.integers(low, high, shape.shape) if name in ("codes", "zeros") else random.uniform(-1, 1, shape.shape)
        made[name] = jnp.asarray(values.astype(np.float32)).astype(layout.scale_dtype if shape.dtype == jnp.float32 else shape.dtype)
    return made


def elements(arrays: dict[str, jax.Array], layout: Layout) -> np.ndarray:
    """By the definition in Layout."""
    wide = {name: np.asarray(x, np.float32) for name, x in arrays.items()}
    of_columns = {name: np.repeat(x, wide["codes"].shape[1] // x.shape[1], axis=1) for name, x in wide.items()}
    moved = of_columns["codes"] - of_columns.get("zeros", np.float32(0))
    values = moved * of_columns["scales"]
    return values + of_columns["minimums"] if layout.correction == "minimum" else values


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_weight_in_tiles(name):
    layout = LAYOUTS[name]
    arrays = unpacked(layout)
    weight = weight_of(pack(dict(arrays), layout), layout, COLUMNS)
    assert isinstance(weight, TiledWeight) and weight.shape == (ROWS, COLUMNS)
    expected = elements(arrays, layout)
    np.testing.assert_array_equal(weight.dequantize(jnp.float32), expected)
    indices = jnp.asarray([0, 63, 64, 130, 191], jnp.int32)
    np.testing.assert_array_equal(weight.rows(indices, jnp.float32), expected[np.asarray(indices)])
    for tokens in (FEW_TOKENS, FEW_TOKENS + 1):
        check_product(weight, expected, tokens)


@pytest.mark.parametrize("rows", [320, 704, 768])
def test_a_product_some_tiles_at_a_time(rows):
    """Four tiles of 64 rows fit: five of them in two parts, twelve in a loop, and eleven, of which three are left over."""
    layout = LAYOUTS["Q4_1"]
    arrays = unpacked(layout, rows, 384)
    check_product(weight_of(pack(dict(arrays), layout), layout, 384), elements(arrays, layout), FEW_TOKENS + 1)


def check_product(weight, expected: np.ndarray, tokens: int) -> None:
    x = np.random.default_rng(tokens).standard_normal((tokens, expected.shape[1])).astype(np.float32)
    found = jax.jit(lambda x: quantized_matmul(x, weight, jnp.dtype("float32")))(jnp.asarray(x))
    exact = x.astype(np.float64) @ expected.T.astype(np.float64)
    # Bounds of float32 sums: what is added up, times its last bit.
    np.testing.assert_array_less(np.abs(found - exact), 3e-6 * (np.abs(x) @ np.abs(expected).T + 30 * np.abs(x).sum(1)[:, None]))


def test_loops_of_one_program_share_their_memory(monkeypatch):
    """Each of them writes its result anew; what a loop begins with is not kept for it from the program's start."""
    layout, tokens, rows, depth = LAYOUTS["Q4_1"], 32, 8 * 64, 96
    monkeypatch.setattr(tiled, "_ELEMENTS", 64 * depth)
    shapes = jax.eval_shape(lambda: weight_of(pack(unpacked(layout, rows, depth), layout), layout, depth))

    def run(x, weights):
        for weight in weights:
            x = x + quantized_matmul(x, weight, x.dtype)[:, :depth]
        return x

    compiled = jax.jit(run).lower(jax.ShapeDtypeStruct((tokens, depth), jnp.float32), [shapes] * 4).compile()
    result, widened = 4 * tokens * rows, 4 * 64 * depth
    used = compiled.memory_analysis()
    assert used is not None and used.temp_size_in_bytes < 2 * result + 2 * widened


def test_what_has_no_tiles():
    for layout, rows in ((LAYOUTS["Q4_1"], 100), (Layout("nf4", 64), 128), (Layout("uint4", 8, "minimum"), 128)):
        arrays = {name: jnp.ones(shape.shape, shape.dtype) for name, shape in layout.unpacked_shapes(rows, 64).items()}
        assert not isinstance(weight_of(pack(arrays, layout), layout, 64), TiledWeight)
