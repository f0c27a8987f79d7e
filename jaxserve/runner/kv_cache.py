"""KVCache: how many pages there are of each KV group, and the arrays that hold them."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jaxserve.errors import DeviceError
from jaxserve.models import KVGroup, ModelConfig
from jaxserve.pallas_kernels import KV_HEADS_AXIS, LayerKV, layer_kv_shape, make_layer_kv
from jaxserve.runner.config import RunnerConfig

KV_SPEC = PartitionSpec(*("tensor" if axis == KV_HEADS_AXIS else None for axis in range(KV_HEADS_AXIS + 1)))


@dataclass(frozen=True)
class KVCachePlan:
    """Sizes of a KV cache.

    Attributes:
        num_pages, windows: of each KV group.
        page_size: tokens a page.
        max_total_tokens: most tokens of a request: one alone always fits.
        group_of_layer: for each layer its KV group.
        num_kv_heads: on each device.
        head_dim: of a KV head.
        dtype: of the pages.
    """

    num_pages: tuple[int, ...]
    windows: tuple[int | None, ...]
    page_size: int
    max_total_tokens: int
    group_of_layer: tuple[int, ...]
    num_kv_heads: int
    head_dim: int
    dtype: jnp.dtype

    @property
    def pages_per_request(self) -> int:
        """Width of a page table."""
        return -(-self.max_total_tokens // self.page_size)

    @property
    def nbytes(self) -> int:
        """Memory on each device."""
        page = 2 * self.page_size * self.num_kv_heads * self.head_dim * self.dtype.itemsize
        return sum(page * self.num_pages[group] for group in self.group_of_layer)

    def abstract(self, mesh: Mesh | AbstractMesh) -> tuple[LayerKV, ...]:
        """Shapes and shardings of the arrays, one LayerKV a layer."""
        sharding = NamedSharding(mesh, KV_SPEC)

        def pages(group: int) -> jax.ShapeDtypeStruct:
            heads = self.num_kv_heads * mesh.shape["tensor"]
            return jax.ShapeDtypeStruct(
                layer_kv_shape(self.num_pages[group], self.page_size, heads, self.head_dim), self.dtype, sharding=sharding
            )

        return tuple((pages(group), pages(group)) for group in self.group_of_layer)  # pyright: ignore[reportReturnType]

    def allocate(self, mesh: Mesh) -> tuple[LayerKV, ...]:
        """The arrays, zeroed, sharded over KV heads."""
        make = jax.jit(make_layer_kv, static_argnums=range(5), out_shardings=NamedSharding(mesh, KV_SPEC))
        heads = self.num_kv_heads * mesh.shape["tensor"]
        return tuple(make(self.num_pages[group], self.page_size, heads, self.head_dim, self.dtype) for group in self.group_of_layer)


def plan_kv_cache(model: ModelConfig, config: RunnerConfig, tensor_size: int, dtype: jnp.dtype, kv_bytes: int) -> KVCachePlan:
    """Divide memory among the KV groups, in proportion to what the longest request needs of each.

    Args:
        model: shapes and KV groups.
        config: limits; a given max_total_tokens must fit, otherwise it becomes what fits.
        tensor_size: devices that share the KV heads.
        dtype: of the pages.
        kv_bytes: memory on each device.

    Raises:
        DeviceError: a request of max_total_tokens, or the shortest one of all, does not fit.
    """
    heads, page_size = model.local_kv_heads(tensor_size), config.page_size
    layer_page_bytes = 2 * page_size * heads * model.head_dim * dtype.itemsize
    page_bytes = [len(group.layers) * layer_page_bytes for group in model.kv_groups]

    def pages_needed(num_tokens: int) -> list[int]:
        return [_pages_of_request(group, num_tokens, config) for group in model.kv_groups]

    def bytes_needed(num_tokens: int) -> int:
        return sum(pages * size for pages, size in zip(pages_needed(num_tokens), page_bytes, strict=True))

    longest = min(config.max_total_tokens or model.max_position_embeddings, model.max_position_embeddings)
    if bytes_needed(longest) > kv_bytes:
        fitting = _largest(lambda pages: bytes_needed(pages * page_size) <= kv_bytes, longest // page_size) * page_size
        if config.max_total_tokens is not None or fitting == 0:
            needed = bytes_needed(longest) / 2**20
            raise DeviceError(
                f"a request of {longest} tokens needs {needed:.1f} MiB of KV cache, there are {kv_bytes / 2**20:.1f} MiB ({fitting} tokens)"
            )
        longest = fitting
    requests = min(kv_bytes / bytes_needed(longest), config.max_batch_size)
    return KVCachePlan(
        num_pages=tuple(int(pages * requests) for pages in pages_needed(longest)),
        windows=tuple(group.window for group in model.kv_groups),
        page_size=page_size,
        max_total_tokens=longest,
        group_of_layer=model.group_of_layer,
        num_kv_heads=heads,
        head_dim=model.head_dim,
        dtype=dtype,
    )


def _pages_of_request(group: KVGroup, num_tokens: int, config: RunnerConfig) -> int:
    """Most pages that one request holds at a time: all of them, or those of its window and of the step that moves it."""
    pages = -(-num_tokens // config.page_size)
    if group.window is None:
        return pages
    # A window and a step each may begin and end within a page.
    return min(pages, -(-group.window // config.page_size) + -(-config.max_batch_tokens // config.page_size) + 2)


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` that fits, by bisection; 0 if 1 does not."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
