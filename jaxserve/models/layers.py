"""The parts that decoders are made of. Modules of our own: some of Flax NNX's fail under strict dtype promotion.

All of them see the local shards of a `jax.shard_map` over the mesh axis "tensor". T tokens, flat.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.models.parameters import Axis, Parameter, Source
from jaxserve.pallas_kernels import add_rms_norm, matmul


def norm_weight(name: str, size: int) -> nnx.Param:
    """Declare the weight [size] of a norm."""
    return nnx.Param(Parameter((Source(f"{name}.weight", (Axis("hidden", size),)),), "ones"))


class RMSNorm(nnx.Module):
    """Root mean square norm of the residual stream, taken together with the addition before it."""

    def __init__(self, name: str, size: int, eps: float):
        self.eps = eps
        self.weight = norm_weight(name, size)

    def __call__(self, x: jax.Array, residual: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The sum of x and residual [T, size], normalised, and as it is."""
        return add_rms_norm(x, residual, self.weight[...], self.eps)


class DenseFormat(nnx.Module):
    """A matrix kept as [N, K] in the dtype of the activations.

    A format owns the arrays that hold a matrix and the product with it; quantized ones declare more arrays and another product.
    """

    def __init__(self, sources: tuple[Source, ...]):
        self.weight = nnx.Param(Parameter(sources))

    def matmul(self, x: jax.Array, out_dtype: jnp.dtype | None = None) -> jax.Array:
        """x [T, K] times the transposed matrix: [T, N]."""
        return matmul(x, self.weight[...], out_dtype or x.dtype)

    def rows(self, indices: jax.Array) -> jax.Array:
        """Rows of the matrix, [T, K], of indices int32 [T] within it."""
        return self.weight[...].at[indices].get(mode="promise_in_bounds")


class Linear(nnx.Module):
    """x [T, K] -> [T, N], cut by rows (each shard has its own outputs) or by columns (the shards' sums are added up).

    Args:
        names: checkpoint modules whose rows are stacked, within each shard.
        outputs: the rows of each.
        inputs: the columns.
        bias: whether each has one.
    """

    def __init__(self, names: tuple[str, ...], outputs: tuple[Axis, ...], inputs: Axis, bias: bool):
        self.reduce = inputs.units > 0
        self.matrix = DenseFormat(tuple(Source(f"{name}.weight", (axis, inputs)) for name, axis in zip(names, outputs, strict=True)))
        sources = tuple(Source(f"{name}.bias", (axis,)) for name, axis in zip(names, outputs, strict=True))
        self.bias = nnx.Param(Parameter(sources)) if bias else None

    def __call__(self, x: jax.Array, deterministic: bool = False) -> jax.Array:
        """x [T, K] -> [T, N]; `deterministic` as in AttentionMetadata."""
        y = self.product(x, deterministic)
        return y if self.bias is None else y + self.bias[...][None, :]

    def product(self, x: jax.Array, deterministic: bool = False) -> jax.Array:
        """The result before the bias is added."""
        y = self.matrix.matmul(x)
        if not self.reduce:
            return y
        return sum_in_order(y) if deterministic else jax.lax.psum(y, "tensor")


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

    def __init__(self, name: str, vocab_size: int, hidden_size: int):
        axes = Axis("vocabulary entries", vocab_size, units=vocab_size, pad=True), Axis("hidden", hidden_size)
        self.vocab_size = vocab_size
        self.matrix = DenseFormat((Source(f"{name}.weight", axes),))

    def __call__(self, token_ids: jax.Array) -> jax.Array:
        """Vectors [T, K] of int32 token ids [T]; each is held by one shard, the others add zero."""
        shards = jax.lax.axis_size("tensor")
        local = -(-self.vocab_size // shards)
        indices = token_ids - jax.lax.axis_index("tensor") * local
        held = (indices >= 0) & (indices < local)
        rows = self.matrix.rows(jnp.where(held, indices, 0))
        return jax.lax.psum(jnp.where(held[:, None], rows, jnp.zeros((), rows.dtype)), "tensor")

    def logits(self, x: jax.Array) -> jax.Array:
        """Logits, float32 [T, vocab_size], of hidden states [T, K]; every shard gets all of them."""
        return jax.lax.all_gather(self.matrix.matmul(x, jnp.float32), "tensor", axis=1, tiled=True)[:, : self.vocab_size]
