"""What a loader needs of a checkpoint, whatever its format, and the check that it holds what the model declares."""

import math
from collections.abc import Collection, Iterable, Mapping, Set
from typing import Protocol

import numpy as np

from jaxserve.errors import WeightsError
from jaxserve.models.formats import QuantizedPart
from jaxserve.models.kv_scaling import is_kv_scale
from jaxserve.models.parameters import Parameter

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_NAMES_SHOWN = 3
# How names end of tensors that nothing but a quantized matrix has.
_QUANTIZED = (".qweight", ".weight_packed", ".SCB", ".absmax")
_ROWS_COMPARED = 4096


class Checkpoint(Protocol):
    """Tensors by their Hugging Face name."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of every tensor, in the order that reads them best."""
        ...

    @property
    def dtypes(self) -> Mapping[str, str]:
        """Of every tensor, as safetensors calls them."""
        ...

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Part of a tensor, as it is stored; reads little more than that part.

        Raises:
            WeightsError: the file is damaged or cannot be read.
        """
        ...


def embeddings_are_tied(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint whose config.json ties the head to the embeddings means it: some hold both, and as in transformers they
    are tied only where both are the same."""
    shape = checkpoint.shapes.get(EMBEDDING, ())
    if checkpoint.shapes.get(HEAD) != shape or len(shape) != 2:
        return True
    chunks = (slice(i, min(i + _ROWS_COMPARED, shape[0])) for i in range(0, shape[0], _ROWS_COMPARED))
    pairs = ((checkpoint.read(EMBEDDING, (rows, slice(0, shape[1]))), checkpoint.read(HEAD, (rows, slice(0, shape[1])))) for rows in chunks)
    return all(np.array_equal(one, other) for one, other in pairs)


def check_tensors(parameters: Iterable[Parameter | QuantizedPart], checkpoint: Checkpoint, ignored: Set[str] = frozenset()) -> None:
    """Compare declaration and checkpoint.

    Args:
        ignored: tensors that may be there although the model does not declare them.

    Raises:
        WeightsError: naming tensors that are missing, extra or of another shape or dtype, all in one line.
    """
    declared = {stored.name: stored for parameter in parameters for stored in parameter.tensors}
    shapes, dtypes = checkpoint.shapes, checkpoint.dtypes
    missing = [name for name, stored in declared.items() if name not in shapes and not stored.optional]
    unknown = [name for name in shapes if name not in declared and name not in ignored and not _is_derived(name)]
    extra = [name for name in unknown if not _is_empty_bias(name, declared, checkpoint)]
    misshapen = [
        f"{name} is {list(shapes[name])}, not {list(stored.shape or (1,))}"
        for name, stored in declared.items()
        if name in shapes and not _fits(shapes[name], stored.shape)
    ]
    mistyped = [
        f"{name} has dtype {dtypes[name]}, not {' or '.join(stored.dtypes)}"
        for name, stored in declared.items()
        if name in shapes and dtypes[name] not in stored.dtypes
    ]
    kinds = ("missing", missing), ("not part of the model", extra), ("of the wrong shape", misshapen), ("of the wrong dtype", mistyped)
    problems = [
        f"{kind}: {'; '.join(names[:_NAMES_SHOWN])}{f' and {len(names) - _NAMES_SHOWN} more' if len(names) > _NAMES_SHOWN else ''}"
        for kind, names in kinds
        if names
    ]
    quantized = [name for name in extra if name.endswith(_QUANTIZED)]
    if quantized and not any(name.endswith(_QUANTIZED) for name in declared):
        problems.append(f"{quantized[0]} is of a quantized matrix, and nothing says how: config.json has no quantization_config for it")
    if problems:
        raise WeightsError(f"the checkpoint's tensors do not fit config.json: {'. '.join(problems)}")


def _fits(shape: tuple[int, ...], declared: tuple[int, ...] | None) -> bool:
    return declared is None or shape == declared or (declared == () and math.prod(shape) == 1)


def _is_empty_bias(name: str, declared: Collection[str], checkpoint: Checkpoint) -> bool:
    """Whether a tensor is the bias of zeros that older AutoGPTQ gave every module it quantized."""
    module, _, kind = name.rpartition(".")
    if kind != "bias" or f"{module}.qweight" not in declared:
        return False
    return not checkpoint.read(name, tuple(slice(0, size) for size in checkpoint.shapes[name])).any()


def _is_derived(name: str) -> bool:
    """Old Llama checkpoints store the rotary frequencies, which follow from config.json; others tell how a KV cache of 8 bits is scaled."""
    return name.endswith(".rotary_emb.inv_freq") or is_kv_scale(name)
