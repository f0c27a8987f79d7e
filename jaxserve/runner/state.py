"""DeviceState: what stays on the devices from step to step and is donated to each."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import export
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jaxserve.pallas_kernels import LayerKV
from jaxserve.runner.kv_cache import KV_SPEC, KVCachePlan
from jaxserve.runner.sampling_state import SamplingState, make_sampling_state


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


# Programs are kept in files with the trees of their arguments and results.
for _state in (DeviceState, SamplingState):
    export.register_pytree_node_serialization(
        _state, serialized_name=f"jaxserve.{_state.__name__}", serialize_auxdata=lambda _: b"", deserialize_auxdata=lambda _: ()
    )

STATE_SPEC = DeviceState(KV_SPEC, PartitionSpec(), PartitionSpec(), PartitionSpec())  # pyright: ignore[reportArgumentType]
"""How a DeviceState lies on the mesh (a prefix of its tree): KV heads are split, all else is on every device."""


def abstract_state(
    plan: KVCachePlan, num_slots: int, vocab_size: int, hidden: jax.ShapeDtypeStruct, mesh: Mesh | AbstractMesh
) -> DeviceState:
    """Shapes and shardings, to compile with; those of `hidden` are given."""
    replicated = NamedSharding(mesh, PartitionSpec())

    def placed(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated)

    sampling = jax.eval_shape(lambda: make_sampling_state(num_slots, vocab_size))
    tables = tuple(jax.ShapeDtypeStruct((num_slots, plan.pages_per_request), jnp.int32) for _ in plan.num_pages)
    return DeviceState(plan.abstract(mesh), *jax.tree.map(placed, (tables, sampling, hidden)))


def allocate_state(plan: KVCachePlan, num_slots: int, vocab_size: int, hidden: jax.ShapeDtypeStruct, mesh: Mesh) -> DeviceState:
    """The arrays, empty."""

    def rest() -> tuple[tuple[jax.Array, ...], SamplingState, jax.Array]:
        tables = tuple(jnp.zeros((num_slots, plan.pages_per_request), jnp.int32) for _ in plan.num_pages)
        return tables, make_sampling_state(num_slots, vocab_size), jnp.zeros(hidden.shape, hidden.dtype)

    return DeviceState(plan.allocate(mesh), *jax.jit(rest, out_shardings=NamedSharding(mesh, PartitionSpec()))())
