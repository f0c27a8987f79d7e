"""DeviceState: what stays on the devices from step to step and is donated to each."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import export
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jaxserve.pallas_kernels import LayerKV
from jaxserve.runner.kv_cache import KV_SPEC, KVCachePlan
from jaxserve.runner.sampling_state import SamplingState, make_sampling_state
from jaxserve.runner.vocabulary import shard_width


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DeviceState:
    """All that a step changes.

    Attributes:
        kv: one LayerKV a layer.
        page_tables: for each KV group int32 [slots, pages a request].
        sampling: counts, biases, bans and last tokens by slot.
        hidden: [most tokens of a step, hidden], what the last layer gave for each token of the last step.
    """

    kv: tuple[LayerKV, ...]
    page_tables: tuple[jax.Array, ...]
    sampling: SamplingState
    hidden: jax.Array


_Rest = tuple[tuple[jax.Array, ...], SamplingState, jax.Array]  # all but keys and values

# Programs are kept in files with the trees of their arguments and results.
for _state in (DeviceState, SamplingState):
    export.register_pytree_node_serialization(
        _state, serialized_name=f"jaxserve.{_state.__name__}", serialize_auxdata=lambda _: b"", deserialize_auxdata=lambda _: ()
    )

_EVERYWHERE = PartitionSpec()
VOCABULARY_SPEC = PartitionSpec(None, "tensor")
"""How rows over the vocabulary lie on the mesh, such as logits [R, V], where V counts the last shards' padding."""
SAMPLING_SPEC = SamplingState(VOCABULARY_SPEC, VOCABULARY_SPEC, _EVERYWHERE)  # pyright: ignore[reportArgumentType]
STATE_SPEC = DeviceState(KV_SPEC, _EVERYWHERE, SAMPLING_SPEC, _EVERYWHERE)  # pyright: ignore[reportArgumentType]
"""How a DeviceState lies on the mesh (a prefix of its tree): KV heads and vocabulary are split, all else is on every device."""


def abstract_state(
    plan: KVCachePlan, num_slots: int, vocab_size: int, hidden: jax.ShapeDtypeStruct, mesh: Mesh | AbstractMesh
) -> DeviceState:
    """Shapes and shardings, to compile with; those of `hidden` are given."""

    def placed(x: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    rest = jax.eval_shape(lambda: _empty(plan, num_slots, vocab_size, hidden, mesh))
    return DeviceState(plan.abstract(mesh), *jax.tree.map(placed, rest, _shardings(plan, mesh)))


def allocate_state(plan: KVCachePlan, num_slots: int, vocab_size: int, hidden: jax.ShapeDtypeStruct, mesh: Mesh) -> DeviceState:
    """The arrays, empty."""

    def rest() -> _Rest:
        return _empty(plan, num_slots, vocab_size, hidden, mesh)

    return DeviceState(plan.allocate(mesh), *jax.jit(rest, out_shardings=_shardings(plan, mesh))())


def _empty(plan: KVCachePlan, num_slots: int, vocab_size: int, hidden: jax.ShapeDtypeStruct, mesh: Mesh | AbstractMesh) -> _Rest:
    shards = mesh.shape["tensor"]
    tables = tuple(jnp.zeros((num_slots, plan.pages_per_request), jnp.int32) for _ in plan.num_pages)
    sampling = make_sampling_state(num_slots, shards * shard_width(vocab_size, shards))
    return tables, sampling, jnp.zeros(hidden.shape, hidden.dtype)


def _shardings(plan: KVCachePlan, mesh: Mesh | AbstractMesh) -> Any:
    """Of the tree of _empty()."""
    tables = (STATE_SPEC.page_tables,) * len(plan.num_pages)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), (tables, STATE_SPEC.sampling, STATE_SPEC.hidden))
