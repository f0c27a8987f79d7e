"""What goes into a model's matrices, and 4 bits on load that heed it."""

from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from plain_forward import make_mesh

from jaxserve.config import ModelOptions
from jaxserve.models.formats.on_load import SCHEMES, quantize
from jaxserve.pallas_kernels import pack, weight_of
from jaxserve.weights import resolve_model
from jaxserve.weights.input_moments import TOKENS, input_moments
from jaxserve.weights.loader import load_model


def test_moments_of_a_tiny_model(tiny_checkpoint: Callable[[str], Path]) -> None:
    """On four devices and in bfloat16 about the same as on one; the first are those of normed embeddings; every matrix has some."""
    folder, found = tiny_checkpoint("llama-bias"), []
    for tensor, dtype in ((1, "float32"), (4, "bfloat16")):
        options = ModelOptions(model_id=str(folder), dtype=dtype)
        model = load_model(resolve_model(options), options, make_mesh(tensor))
        arrays = dict(zip(model.architecture.parameters, model.leaves, strict=True))
        found.append(input_moments(model.config, arrays.__getitem__, make_mesh(tensor), model.dtype))
        if tensor == 1:
            by_name = {parameter.sources[0].name: np.asarray(leaf) for parameter, leaf in arrays.items()}
            rows = by_name["model.embed_tokens.weight"][np.random.default_rng(0).integers(0, model.config.vocab_size, TOKENS)]
            normed = rows / np.sqrt((rows**2).mean(1, keepdims=True) + model.config.norm_eps)
            normed = normed * by_name["model.layers.0.input_layernorm.weight"]
            first = next(moments for sources, moments in found[0].items() if "0.self_attn.q_proj" in sources[0].name)
            np.testing.assert_allclose(first, (normed**2).mean(0), rtol=1e-5)
            assert len(found[0]) == 4 * model.config.num_layers
    one, four = found
    assert one.keys() == four.keys()
    for sources, moments in one.items():
        assert moments.shape == (sources[0].axes[1].size,)
        np.testing.assert_allclose(moments, four[sources], rtol=0.1)


def test_scales_heed_what_goes_in() -> None:
    """Two columns of 128 have large inputs: their product's error falls; a row of zeros stays one; scales stay near the largest."""
    random = np.random.default_rng(0)
    weight, inputs = random.standard_normal((48, 128)).astype(np.float32), random.standard_normal((64, 128)).astype(np.float32)
    weight[3] = 0
    inputs[:, [5, 70]] *= 30
    layout = SCHEMES["bitsandbytes-nf4"].layout
    errors = []
    for moments in (None, jnp.asarray((inputs**2).mean(0))):
        unpacked = quantize(jnp.asarray(weight), layout, cut_columns=False, moments=moments)
        found = np.asarray(weight_of(pack(dict(unpacked), layout), layout, 128).dequantize(jnp.float32))
        errors.append(np.square((found - weight) @ inputs.T).mean())
        assert (found[3] == 0).all()
        ratio = np.asarray(unpacked["scales"])[4:] / np.abs(weight[4:].reshape(44, 2, 64)).max(2)
        assert (ratio > 0.59).all() and (ratio < 1.11).all()
    assert errors[1] < errors[0] / 4
