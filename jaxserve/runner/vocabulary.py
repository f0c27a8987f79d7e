"""A vocabulary that is cut over the shards of a mesh, and what they tell each other of it."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels import Shards, all_gather, all_to_all


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class VocabularyShards:
    """Each shard has as many token ids as all others, a range; what is behind the vocabulary is padding. Made while tracing, inside
    `jax.shard_map`.

    Attributes:
        size: static; V.
        shards: two or more.
    """

    size: int = field(metadata={"static": True})
    shards: Shards

    @property
    def width(self) -> int:
        """Token ids of a shard, padding among them."""
        return shard_width(self.size, self.shards.count)

    @property
    def first(self) -> jax.Array:
        """int32, the first one of this shard."""
        return jax.lax.axis_index(self.shards.axis) * jnp.int32(self.width)

    @property
    def num_held(self) -> jax.Array:
        """int32, how many of this shard are none of padding."""
        return jnp.clip(jnp.int32(self.size) - self.first, jnp.int32(0), jnp.int32(self.width))

    @property
    def token_ids(self) -> jax.Array:
        """int32 [width], of this shard."""
        return self.first + jnp.arange(self.width, dtype=jnp.int32)

    def places(self, token_ids: jax.Array) -> jax.Array:
        """Where this shard has token ids, int32 of any shape; `width` where another one has them."""
        held = (token_ids >= self.first) & (token_ids < self.first + self.num_held)
        return jnp.where(held, token_ids - self.first, jnp.int32(self.width))

    def own_range(self, x: jax.Array) -> jax.Array:
        """This shard's columns [R, width] of bool [R, V] or wider; False where there are none."""
        missing = self.shards.count * self.width - x.shape[1]
        padded = jnp.pad(x, ((0, 0), (0, missing))) if missing > 0 else x
        return jax.lax.dynamic_slice_in_dim(padded, self.first, self.width, axis=1)

    def best(self, values: jax.Array, token_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of what each shard found, both [shards, ...], the largest value and its token id; the lowest token id of equals."""
        value, token_id = values[0], token_ids[0]
        for theirs, their_id in zip(values[1:], token_ids[1:], strict=True):  # one by one XLA computes it beside what follows
            value, token_id = jnp.where(theirs > value, theirs, value), jnp.where(theirs > value, their_id, token_id)
        return value, jnp.minimum(token_id, jnp.int32(self.size - 1))

    def told(self, x: jax.Array) -> jax.Array:
        """What each shard has, [shards, ...] of this one's: see `all_gather`."""
        return all_gather(x, self.shards)

    def look_up(self, token_ids: jax.Array, values: jax.Array) -> jax.Array:
        """Values, float32 of the shape of token_ids, each of the shard that has the token."""
        shard = jnp.minimum(token_ids // jnp.int32(self.width), jnp.int32(self.shards.count - 1))
        return jnp.take_along_axis(self.told(values), shard[None], axis=0)[0]

    def whole_rows(self, part: jax.Array, wanted: jax.Array | None = None, after: jax.Array | None = None) -> jax.Array:
        """This shard's turns of the rows, whole: float32 [turns, V] or wider, of all shards' [R, width].

        Turn t of shard s is row t * shards + s. So the rows of a step that is not full are spread over all shards, too.

        Args:
            part, wanted, after: as for `all_to_all`.
        """
        wanted = None if wanted is None else self._filled(wanted)
        return all_to_all(self._filled(part), self.shards, wanted, after)

    def own_rows(self, x: jax.Array) -> jax.Array:
        """This shard's turns of [R, ...], which all have alike: [turns, ...]."""
        x = self._filled(x)
        turns = x.reshape(-1, self.shards.count, *x.shape[1:])
        return jax.lax.dynamic_index_in_dim(turns, jax.lax.axis_index(self.shards.axis), axis=1, keepdims=False)

    def all_rows(self, turns: jax.Array, num_rows: int) -> jax.Array:
        """[R, N] of all shards' turns, as `told` gives them, [shards, turns, N]."""
        return jnp.swapaxes(turns, 0, 1).reshape(-1, *turns.shape[2:])[:num_rows]

    def _filled(self, x: jax.Array) -> jax.Array:
        """[R, ...] with as many rows as the shards can share."""
        missing = -x.shape[0] % self.shards.count
        return jnp.pad(x, ((0, missing), *((0, 0) for _ in x.shape[1:]))) if missing else x


def shard_width(vocab_size: int, shards: int) -> int:
    """Token ids of each shard of a vocabulary."""
    return -(-vocab_size // shards)
