"""Scheme: how one quantized matrix lies in a checkpoint and on the devices; Storage: how it is read."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from jaxserve.errors import WeightsError
from jaxserve.models.parameters import Stored
from jaxserve.pallas_kernels import Layout

Unpacked = dict[str, np.ndarray]
"""The arrays that `Layout` describes, of a part of a matrix."""

WORDS = ("I32",)


class Tensors(Protocol):
    """What a storage needs of a checkpoint."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """By name."""
        ...

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A part of a tensor, a slice an axis."""
        ...


@dataclass(frozen=True)
class Scheme:
    """Plain values, so that schemes compare and travel.

    Attributes:
        stored: in which form the checkpoint has the matrix, a key of `storages.STORAGES`; "dense": it is quantized as it is loaded.
        layout: on the devices.
        group: columns that share a scale in the checkpoint; 0: all.
        group_rows: rows that do; 0: all.
        ordered: columns lie in the order of the model (no desc_act).
        variant: what else the storage distinguishes.
    """

    stored: str
    layout: Layout
    group: int = 0
    group_rows: int = 1
    ordered: bool = True
    variant: str = ""


class Storage(Protocol):
    """One form of quantized matrices in checkpoints."""

    def tensors(self, scheme: Scheme, module: str, n: int, k: int) -> tuple[Stored, ...]:
        """What there is of the matrix [n, k] of a module.

        Raises:
            WeightsError: no such matrix is stored so.
        """
        ...

    def read(self, scheme: Scheme, tensors: Tensors, module: str, rows: slice, columns: slice) -> Unpacked:
        """Rows and columns of it, quantized as `scheme.layout` tells.

        Where columns have no order, `columns` are all of the row's; then `permutation`, int32 [k], tells where each column of the result
        comes from.

        Raises:
            WeightsError: the tensors contradict each other or the scheme.
        """
        ...


def divided(size: int, by: int, module: str, axis: str) -> int:
    """size / by, of the rows or columns of a module's matrix.

    Raises:
        WeightsError: that leaves a rest.
    """
    if size % by:
        raise WeightsError(f"{module} has {size} {axis}, which are not packed in pieces of {by}, as quantization_config says")
    return size // by


def cut_groups(values: np.ndarray, columns: slice, scheme: Scheme) -> np.ndarray:
    """Values [n, groups] of the checkpoint's groups, for the groups of the layout in some of its columns."""
    k = columns.stop - columns.start
    starts = np.arange(columns.start, columns.stop, scheme.layout.group_of(k))
    return values[:, starts // scheme.group] if scheme.group else values


def sorted_columns(scheme: Scheme, tensors: Tensors, name: str) -> np.ndarray | None:
    """Columns sorted by the group that a tensor tells of each, int32 [k]; None: they are.

    Raises:
        WeightsError: the scheme says otherwise, or groups are not of its size.
    """
    if name not in tensors.shapes or not scheme.group:
        return None
    (k,) = tensors.shapes[name]
    indices = tensors.read(name, (slice(0, k),))
    in_order = np.arange(k, dtype=np.int32) // scheme.group
    if scheme.ordered:
        if not np.array_equal(indices, in_order):
            raise WeightsError(f"{name} is not in order, as quantization_config says")
        return None
    order = np.argsort(indices, kind="stable").astype(np.int32)
    if not np.array_equal(indices[order], in_order):
        raise WeightsError(f"{name} does not give each group {scheme.group} columns")
    return order
