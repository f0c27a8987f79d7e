"""Where a model's files are. Imports no JAX."""

from dataclasses import dataclass
from pathlib import Path

from jaxserve.config import ModelOptions
from jaxserve.errors import ModelNotFound


@dataclass(frozen=True)
class ModelSource:
    """A model found.

    Attributes:
        model_id: as given by the user.
        revision: of a hub id, "" if none.
        path: local folder, or .gguf file.
    """

    model_id: str
    revision: str
    path: Path

    @property
    def is_gguf(self) -> bool:
        """Whether `path` is one GGUF file instead of a folder."""
        return self.path.is_file()


def resolve_model(options: ModelOptions) -> ModelSource:
    """Find a model, downloading it where need be: hub id, local folder or .gguf file; no id at all is the demo model.

    Raises:
        ModelNotFound: one line.
    """
    model_id = options.model_id or ""
    path = Path(model_id).expanduser()
    if path.exists():
        return ModelSource(model_id, "", path)
    raise ModelNotFound(f"{model_id} is neither a file nor a folder")
