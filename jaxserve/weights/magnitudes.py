"""Looking at the numbers of dense weights: one that is infinite or NaN makes nonsense of all that comes after it.

They are looked at where they lie. A GPU reads its memory once for that (4 ms for an 8B model on an H200), with a program for each shape;
a thread of the host would take a second and more. On a CPU numpy is ten times as fast as what XLA makes of it.
"""

import logging
from collections.abc import Callable, Mapping
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxserve.errors import WeightsError
from jaxserve.models.magnitude import float_of_bits, largest_magnitude, magnitude_bits
from jaxserve.models.parameters import Parameter
from jaxserve.pallas_kernels import narrowed
from jaxserve.weights.checkpoint import EMBEDDING, Checkpoint

logger = logging.getLogger(__name__)

_PIECE_ELEMENTS = 1 << 22
_NAMES_SHOWN = 3


class Magnitudes:
    """The largest magnitude of each dense array that is loaded; on GPUs it stays there until all are."""

    def __init__(self, mesh: Mesh):
        self._mesh = mesh
        self._bits: dict[Parameter, tuple[jax.Array, jnp.dtype]] = {}
        self._on_host: dict[Parameter, float] = {}

    def noted(self, parameter: Parameter, array: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """The array of a parameter in the dtype that it is kept in; what float16 cannot hold becomes its largest number."""
        converted = array.dtype != dtype
        # Vectors are so short that fetching them takes less than a program for them.
        if not converted and (array.ndim == 1 or self._mesh.devices.flat[0].platform == "cpu"):
            self._on_host[parameter] = float(np.max([largest_magnitude(np.asarray(shard.data)) for shard in array.addressable_shards]))
            return array
        kept, bits = _looker(self._mesh, parameter.spec, dtype if converted else None)(array)
        self._bits[parameter] = bits, array.dtype
        return array if kept is None else kept

    def check(self, checkpoint: Checkpoint, dtype: jnp.dtype, *, tied: bool) -> None:
        """Refuse weights that are no finite numbers, and tell of those that are not kept as they are.

        Every token goes through all layers and the head, so that one such element makes each answer nonsense. Embeddings that are no head
        concern some tokens only, often such that no text has: a warning.

        Args:
            checkpoint: what the arrays were read from; where something is wrong it is read again, to name the tensor.
            dtype: of the model's activations.
            tied: whether the head is the embeddings.

        Raises:
            WeightsError: naming the tensors.
        """
        largest = self._on_host | self._fetched()
        wrong = [parameter for parameter in largest if not largest[parameter] <= float(jnp.finfo(parameter.dtype(dtype)).max)]
        if kept := {source.name: parameter.dtype(dtype) for parameter in wrong for source in parameter.sources}:
            _tell({name: _magnitude(name, checkpoint) for name in kept}, kept, dtype, tied)

    def _fetched(self) -> dict[Parameter, float]:
        """What was found on the devices of this host."""
        local = jax.device_get([[shard.data for shard in bits.addressable_shards] for bits, _ in self._bits.values()])
        return {
            parameter: float_of_bits(max(int(bits[0]) for bits in shards), dtype)
            for (parameter, (_, dtype)), shards in zip(self._bits.items(), local, strict=True)
        }


def _tell(magnitudes: Mapping[str, float], kept: Mapping[str, jnp.dtype], dtype: jnp.dtype, tied: bool) -> None:
    broken = [name for name, largest in magnitudes.items() if not np.isfinite(largest)]
    if EMBEDDING in broken and not tied:
        broken.remove(EMBEDDING)
        logger.warning("%s has elements that are infinite or not numbers (NaN): tokens that they belong to give nonsense", EMBEDDING)
    if broken:
        raise WeightsError(f"the checkpoint has elements that are infinite or not numbers (NaN), in {_names(broken)}")
    beyond = [name for name, largest in magnitudes.items() if np.isfinite(largest) and largest > float(jnp.finfo(kept[name]).max)]
    if not beyond:
        return
    most = f"up to {max(magnitudes[name] for name in beyond):.6g}, in {_names(beyond)}"
    if any(kept[name] == dtype for name in beyond):
        raise WeightsError(f"the checkpoint has elements that {dtype.name} cannot hold: {most}")
    logger.warning("matrices behind norms are float16, and elements beyond its 65504 became that: %s. --dtype float32 keeps them", most)


def _magnitude(name: str, checkpoint: Checkpoint) -> float:
    """Of a tensor of the checkpoint, which is read again; NaN where it has one."""
    rows, *columns = checkpoint.shapes[name] or (1,)
    step = max(_PIECE_ELEMENTS // max(int(np.prod(columns)), 1), 1)
    rest = tuple(slice(0, size) for size in columns)
    pieces = (checkpoint.read(name, (slice(i, min(i + step, rows)), *rest)) for i in range(0, rows, step))
    found = [largest_magnitude(piece) for piece in pieces]
    return float(np.max(found))


def _names(names: list[str]) -> str:
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else "")


@cache
def _looker(mesh: Mesh, spec: P, dtype: jnp.dtype | None) -> Callable[[jax.Array], tuple[jax.Array | None, jax.Array]]:
    """Array -> it in another dtype (None: it stays as it is), and `magnitude_bits` of each shard, unsigned [shards]."""

    def look(x: jax.Array) -> tuple[jax.Array | None, jax.Array]:
        return None if dtype is None else narrowed(x, dtype), magnitude_bits(x).reshape(1)

    return jax.jit(jax.shard_map(look, mesh=mesh, in_specs=spec, out_specs=(spec, P("tensor")), check_vma=False))
