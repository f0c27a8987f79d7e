"""What a loader needs of a checkpoint, whatever its format, and the check that it holds what the model declares."""

from collections.abc import Iterable, Mapping
from typing import Protocol

import numpy as np

from jaxserve.errors import WeightsError
from jaxserve.models.parameters import Parameter

_NAMES_SHOWN = 3


class Checkpoint(Protocol):
    """Tensors by their Hugging Face name."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of every tensor, in the order that reads them best."""
        ...

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Part of a tensor, in a floating dtype; reads little more than that part.

        Raises:
            WeightsError: the file is damaged or cannot be read.
        """
        ...


def check_tensors(parameters: Iterable[Parameter], checkpoint: Checkpoint) -> None:
    """Compare declaration and checkpoint.

    Raises:
        WeightsError: naming tensors that are missing, extra or of another shape, all in one line.
    """
    declared = {source.name: source.shape for parameter in parameters for source in parameter.sources}
    missing = [name for name in declared if name not in checkpoint.shapes]
    extra = [name for name in checkpoint.shapes if name not in declared and not _is_ignored(name)]
    misshapen = [
        f"{name} is {list(checkpoint.shapes[name])}, not {list(shape)}"
        for name, shape in declared.items()
        if checkpoint.shapes.get(name, shape) != shape
    ]
    problems = [
        f"{kind}: {'; '.join(names[:_NAMES_SHOWN])}{f' and {len(names) - _NAMES_SHOWN} more' if len(names) > _NAMES_SHOWN else ''}"
        for kind, names in (("missing", missing), ("not part of the model", extra), ("of the wrong shape", misshapen))
        if names
    ]
    if problems:
        raise WeightsError(f"the checkpoint's tensors do not fit config.json: {'. '.join(problems)}")


def _is_ignored(name: str) -> bool:
    """Old Llama checkpoints store the rotary frequencies, which follow from config.json."""
    return name.endswith(".rotary_emb.inv_freq")
