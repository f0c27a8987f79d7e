"""The parts that decoders are made of. Modules of our own: some of Flax NNX's fail under strict dtype promotion.

All of them see the local shards of a `jax.shard_map` over the mesh axis "tensor". T tokens, flat.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.models.formats import Quantization, make_format
from jaxserve.models.parameters import Axis, Parameter, Source
from jaxserve.pallas_kernels import add_rms_norm, multiply_gated


@dataclass(frozen=True)
class Place:
    """Where a module is, for what depends on its name in the checkpoint; it must not keep it, as layers of a kind are traced once.

    Attributes:
        quantization: of the model.
        prefix: what the checkpoint has before the module's names.
    """

    quantization: Quantization
    prefix: str


def norm_weight(name: str, size: int) -> nnx.Param:
    """Declare the weight [size] of a norm."""
    return nnx.Param(Parameter((Source(f"{name}.weight", (Axis("hidden", size),)),), "ones"))


class RMSNorm(nnx.Module):
    """Root mean square norm of the residual stream, taken together with the addition before it."""

    def __init__(self, name: str, size: int, eps: float):
        self.eps = eps
        self.weight = norm_weight(name, size)

    def __call__(self, x: jax.Array, residual: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The sum of x and residual [T, size], normalised, and as it is; x may be parts [P, T, size] that are to be added up."""
        return add_rms_norm(x, residual, self.weight[...], self.eps)


class Linear(nnx.Module):
    """x [T, K] -> [T, N], cut by rows (each shard has its own outputs) or by columns (the shards' sums are added up).

    Args:
        names: checkpoint modules whose rows are stacked, within each shard.
        outputs: the rows of each.
        inputs: the columns.
        bias: whether each has one.
        place: whose matrices are kept how.
    """

    def __init__(self, names: tuple[str, ...], outputs: tuple[Axis, ...], inputs: Axis, bias: bool, place: Place):
        self.reduce = inputs.units > 0
        weights = tuple(Source(f"{name}.weight", (axis, inputs)) for name, axis in zip(names, outputs, strict=True))
        self.matrix = make_format(place.quantization, weights, place.prefix)
        sources = tuple(Source(f"{name}.bias", (axis,)) for name, axis in zip(names, outputs, strict=True))
        self.bias = nnx.Param(Parameter(sources)) if bias else None

    def __call__(self, x: jax.Array, deterministic: bool = False) -> jax.Array:
        """x [T, K] -> [T, N]; `deterministic` as in AttentionMetadata."""
        y = self.matrix.matmul(x)
        if self.reduce:
            y = sum_in_order(y) if deterministic else jax.lax.psum(y, "tensor")
        return y if self.bias is None else y + self.bias[...][None, :]

    def parts(self, x: jax.Array, deterministic: bool = False) -> jax.Array:
        """The same, or parts of it [P, T, N] that are still to be added up (`add_parts`)."""
        whole = self.bias is not None or (self.reduce and jax.lax.axis_size("tensor") > 1)
        return self(x, deterministic) if whole else self.matrix.matmul_parts(x)

    def gated(self, x: jax.Array) -> jax.Array:
        """silu(gate) * up, [T, N / 2], where the first half of the outputs is a gate's and nothing is cut by columns."""
        return self.matrix.gated(x) if self.bias is None else multiply_gated(self(x))


def sum_in_order(y: jax.Array) -> jax.Array:
    """The sum of the shards' y [T, N] on each of them, added up in float32 in the order of the shards.

    A ring adds up each part of an array from another shard on, so that from three shards on a token's bits would depend on its place.
    """
    shards = jax.lax.axis_size("tensor")
    padded = jnp.pad(y, ((0, -y.shape[0] % shards), (0, 0))) if y.shape[0] % shards else y
    # Each shard adds up its share of the tokens: [shards, T / shards, N], one part from each.
    parts = jax.lax.all_to_all(padded.reshape(shards, -1, y.shape[1]), "tensor", 0, 0)
    total = parts[0].astype(jnp.float32)
    for part in parts[1:]:
        total = total + part.astype(jnp.float32)
    return jax.lax.all_gather(total.astype(y.dtype), "tensor", axis=0, tiled=True)[: y.shape[0]]


class Embedding(nnx.Module):
    """Token embeddings, each shard holding a range of the vocabulary; also the logits of models that tie both."""

    def __init__(self, name: str, vocab_size: int, hidden_size: int, quantization: Quantization):
        axes = Axis("vocabulary entries", vocab_size, units=vocab_size, pad=True), Axis("hidden", hidden_size)
        self.vocab_size = vocab_size
        self.matrix = make_format(quantization, (Source(f"{name}.weight", axes),))

    def __call__(self, token_ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Vectors [T, K] in a dtype of int32 token ids [T]; each is held by one shard, the others add zero."""
        shards = jax.lax.axis_size("tensor")
        local = -(-self.vocab_size // shards)
        indices = token_ids - jax.lax.axis_index("tensor") * local
        held = (indices >= 0) & (indices < local)
        rows = self.matrix.rows(jnp.where(held, indices, 0), dtype)
        return jax.lax.psum(jnp.where(held[:, None], rows, jnp.zeros((), rows.dtype)), "tensor")

    def logits(self, x: jax.Array) -> jax.Array:
        """Logits, float32 [T, vocab_size], of hidden states [T, K]; every shard gets all of them."""
        return jax.lax.all_gather(self.matrix.matmul(x, jnp.float32), "tensor", axis=1, tiled=True)[:, : self.vocab_size]
