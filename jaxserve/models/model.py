"""A model as the runner takes it: flat arrays beside what turns them into a decoder while tracing."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from jaxserve.errors import StartupError
from jaxserve.models.config import ModelConfig
from jaxserve.models.decoder import Decoder, layer_prefix
from jaxserve.models.formats import QuantizedPart
from jaxserve.models.parameters import Parameter
from jaxserve.pallas_kernels import AttentionMetadata, LayerKV, Shards, attention_dtype, takes_fixed_order
from jaxserve.pallas_kernels.paged_attention import check_implementation


@dataclass(frozen=True)
class Architecture:
    """A decoder without its arrays.

    Attributes:
        attention: which kernels compute it, as `Decoder` takes it.
        parameters: declarations in the order of the flat arrays, their sources named as in the checkpoint.
        graphdef, treedef: rebuild the decoder from them.
    """

    config: ModelConfig
    attention: str
    parameters: tuple[Parameter | QuantizedPart, ...]
    graphdef: nnx.GraphDef[Decoder]
    treedef: Any

    @classmethod
    def of(cls, config: ModelConfig, attention: str = "auto") -> "Architecture":
        """Declare a decoder of this shape; `attention` as `Decoder` takes it."""
        graphdef, state = nnx.split(Decoder(config, attention))
        declarations, treedef = jax.tree.flatten(state)
        prefixes = [layer_prefix(path) for path, _ in nnx.to_flat_state(state)]
        parameters = (parameter.prefixed(prefix) for parameter, prefix in zip(declarations, prefixes, strict=True))
        return cls(config, attention, tuple(parameters), graphdef, treedef)

    @property
    def specs(self) -> tuple[PartitionSpec, ...]:
        """How the flat arrays lie on the mesh, for `jax.shard_map`."""
        return tuple(parameter.spec for parameter in self.parameters)

    def apply(
        self,
        leaves: tuple[jax.Array, ...],
        token_ids: jax.Array,
        positions: jax.Array,
        kv: tuple[LayerKV, ...],
        metadata: tuple[AttentionMetadata, ...],
        last: jax.Array,
        shards: Shards,
        *,
        whole: bool = True,
    ) -> tuple[jax.Array, tuple[LayerKV, ...], jax.Array | None]:
        """`Decoder.__call__` on local shards of the arrays; to be traced inside `jax.shard_map`, never called as it is."""
        return self._decoder(leaves)(token_ids, positions, kv, metadata, last, shards, whole=whole)

    def logits(self, leaves: tuple[jax.Array, ...], x: jax.Array, deterministic: bool = False) -> jax.Array:
        """`Decoder.logits`, likewise."""
        return self._decoder(leaves).logits(x, Shards(deterministic=deterministic))

    def has_fixed_order(self, dtype: jnp.dtype, shards: int) -> bool:
        """Whether all products with its matrices keep what `fixed_order` promises (pallas_kernels.matmul), on `shards` devices such as is
        traced for, with activations of a dtype: then deterministic steps may be of several sizes.
        """

        def keeps(parameter: Parameter | QuantizedPart) -> bool:
            if not isinstance(parameter, Parameter):
                return False
            match parameter.local_shape(shards):
                case int(size), int(depth):
                    gated = len(parameter.sources) == 2 and parameter.after_norm  # gate and up
                    return takes_fixed_order((size, depth), parameter.dtype(dtype, shards), gated)
            return True

        return all(map(keeps, self.parameters))

    def _decoder(self, leaves: tuple[jax.Array, ...]) -> Decoder:
        return nnx.merge(self.graphdef, jax.tree.unflatten(self.treedef, leaves))


def check_attention(config: ModelConfig, attention: str, dtype: jnp.dtype, kv_dtype: jnp.dtype | None, page_size: int, shards: int) -> None:
    """Whether `attention` can serve this model, cut over `shards` devices; keys and values are of `kv_dtype`, None: of `dtype`.

    Raises:
        StartupError: it cannot; one line.
    """
    sizes = dict(num_heads=config.num_heads // shards, num_kv_heads=config.local_kv_heads(shards))
    try:
        check_implementation(attention, dtype, kv_dtype, head_dim=config.head_dim, page_size=page_size, **sizes)
    except ValueError as error:
        raise StartupError(f"--attention: {error}") from None


@dataclass(frozen=True)
class Model:
    """An architecture and its arrays.

    Attributes:
        dtype: of activations, and of the arrays that are not quantized.

    A jitted call takes `leaves` flat: with 289 parameters that costs 0.13 ms of host time, 4.6 ms with NNX's split and merge.
    """

    architecture: Architecture
    leaves: tuple[jax.Array, ...]
    dtype: jnp.dtype

    @property
    def config(self) -> ModelConfig:
        """Its shape."""
        return self.architecture.config

    @property
    def kv_dtype(self) -> jnp.dtype:
        """Of keys and values, where the cache is not told another one."""
        return attention_dtype(self.dtype)

    @property
    def specs(self) -> tuple[PartitionSpec, ...]:
        """How the leaves lie on the mesh."""
        return self.architecture.specs

    @property
    def apply(self) -> Callable[..., tuple[jax.Array, tuple[LayerKV, ...], jax.Array | None]]:
        """`Architecture.apply`."""
        return self.architecture.apply

    @property
    def nbytes(self) -> int:
        """Size of all leaves in bytes, over all devices."""
        return sum(leaf.nbytes for leaf in self.leaves)
