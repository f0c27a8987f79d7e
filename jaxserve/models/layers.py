"""The parts that decoders are made of. Modules of our own: some of Flax NNX's fail under strict dtype promotion.

All of them see the local shards of a `jax.shard_map` over the mesh axis "tensor". T tokens, flat.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.models.formats import Quantization, make_format
from jaxserve.models.parameters import Axis, Parameter, Source
from jaxserve.pallas_kernels import (
    Shards,
    add_branch,
    add_parts,
    add_rms_norm,
    all_reduce,
    all_reduce_add_rms_norm,
    multiply_gated,
)


@dataclass(frozen=True)
class Place:
    """Where a module is, for what depends on its name in the checkpoint; it must not keep it, as layers of a kind are traced once.

    Attributes:
        quantization: of the model.
        prefix: what the checkpoint has before the module's names.
    """

    quantization: Quantization
    prefix: str


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Branch:
    """What is still to be added to the residual stream [T, N].

    Attributes:
        parts: [T, N], or parts of it [P, T, N]; None: nothing, the product before has added itself.
        shared: static; each shard has a part of it.
    """

    parts: jax.Array | None
    shared: bool = field(default=False, metadata={"static": True})

    def whole(self, dtype: jnp.dtype, shards: Shards) -> jax.Array:
        """All of it, [T, N] in a dtype."""
        assert self.parts is not None
        return all_reduce(self.parts, dtype, shards) if self.shared else add_parts(self.parts, dtype)

    def added_to(self, residual: jax.Array, shards: Shards) -> jax.Array:
        """The residual stream [T, N] with it; what several shards have is rounded first, as it is sent so."""
        if self.parts is None:
            return residual
        return add_branch(all_reduce(self.parts, residual.dtype, shards) if self.shared else self.parts, residual)


def norm_weight(name: str, size: int) -> nnx.Param:
    """Declare the weight [size] of a norm."""
    return nnx.Param(Parameter((Source(f"{name}.weight", (Axis("hidden", size),)),), "ones"))


class RMSNorm(nnx.Module):
    """Root mean square norm of the residual stream, taken together with the addition before it."""

    def __init__(self, name: str, size: int, eps: float):
        self.eps = eps
        self.weight = norm_weight(name, size)

    def __call__(self, x: Branch, residual: jax.Array, shards: Shards, dtype: jnp.dtype | None = None) -> tuple[jax.Array, jax.Array]:
        """The sum of x and residual [T, size], normalised in a dtype (the residual's), and as it is."""
        if x.shared and x.parts is not None:
            return all_reduce_add_rms_norm(x.parts, residual, self.weight[...], self.eps, shards, dtype)
        return add_rms_norm(x.parts, residual, self.weight[...], self.eps, dtype, shards.deterministic)


class Linear(nnx.Module):
    """x [T, K] -> [T, N], cut by rows (each shard has its own outputs) or by columns (the shards' sums are added up).

    Args:
        names: checkpoint modules whose rows are stacked, within each shard.
        outputs: the rows of each.
        inputs: the columns.
        bias: whether each has one.
        place: whose matrices are kept how.
        after_norm: as in Parameter.
    """

    def __init__(self, names: tuple[str, ...], outputs: tuple[Axis, ...], inputs: Axis, bias: bool, place: Place, after_norm: bool = False):
        self.reduce = inputs.units > 0
        weights = tuple(Source(f"{name}.weight", (axis, inputs)) for name, axis in zip(names, outputs, strict=True))
        self.matrix = make_format(place.quantization, weights, place.prefix, after_norm)
        sources = tuple(Source(f"{name}.bias", (axis,)) for name, axis in zip(names, outputs, strict=True))
        self.bias = nnx.Param(Parameter(sources)) if bias else None

    def __call__(self, x: jax.Array, shards: Shards) -> jax.Array:
        """x [T, K] -> [T, N]."""
        y = self.matrix.matmul(x, fixed_order=shards.deterministic)
        if self.reduce:
            y = all_reduce(y, x.dtype, shards)
        return y if self.bias is None else y + self.bias[...][None, :]

    def branch(self, x: jax.Array, residual: jax.Array, shards: Shards) -> tuple[Branch, jax.Array]:
        """The same where nothing follows but the residual stream [T, N]: what is still to be added to it, and the stream."""
        if self.bias is not None:
            return Branch(self(x, shards)), residual
        shared = self.reduce and shards.count > 1
        added = None if shared else self.matrix.added(x, residual, shards.deterministic)
        if added is not None:
            return Branch(None), added
        return Branch(self.matrix.matmul_parts(x, residual.dtype, shards.deterministic), shared), residual

    def gated(self, x: jax.Array, shards: Shards, dtype: jnp.dtype) -> jax.Array:
        """silu(gate) * up, [T, N / 2] in a dtype, where the first half of the outputs is a gate's and nothing is cut by columns."""
        if self.bias is None:
            return self.matrix.gated(x, dtype, shards.deterministic)
        gate_up = self.matrix.matmul(x, fixed_order=shards.deterministic)
        return multiply_gated(gate_up + self.bias[...][None, :].astype(gate_up.dtype), dtype)


class Embedding(nnx.Module):
    """Token embeddings, each shard holding a range of the vocabulary; also the logits of models that tie both."""

    def __init__(self, name: str, vocab_size: int, hidden_size: int, quantization: Quantization):
        axes = Axis("vocabulary entries", vocab_size, units=vocab_size, pad=True), Axis("hidden", hidden_size)
        self.vocab_size = vocab_size
        self.matrix = make_format(quantization, (Source(f"{name}.weight", axes),))

    def __call__(self, token_ids: jax.Array, dtype: jnp.dtype) -> Branch:
        """Vectors [T, K] in a dtype of int32 token ids [T]; each is held by one shard, the others add zero."""
        shards = jax.lax.axis_size("tensor")
        local = self._local_entries(shards)
        indices = token_ids - jax.lax.axis_index("tensor") * local
        held = (indices >= 0) & (indices < local)
        rows = self.matrix.rows(jnp.where(held, indices, 0), dtype)
        return Branch(jnp.where(held[:, None], rows, jnp.zeros((), rows.dtype)), shards > 1)

    def logits(self, x: jax.Array, shards: Shards) -> jax.Array:
        """Logits of hidden states [T, K], float32 [T, local entries]: of this shard's range of the vocabulary, the last with padding."""
        return self.matrix.matmul(x, jnp.float32, shards.deterministic)[:, : self._local_entries(shards.count)]

    def _local_entries(self, shards: int) -> int:
        return -(-self.vocab_size // shards)
