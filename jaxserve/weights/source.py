"""Where a model's files are. Imports no JAX."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

from jaxserve.config import ModelOptions
from jaxserve.errors import ModelNotFound
from jaxserve.weights.demo import DEMO_MODEL_ID, ensure_demo_model
from jaxserve.weights.gguf_parts import models_of, part_names
from jaxserve.weights.hub import fetch_gguf, fetch_model, only_gguf


@dataclass(frozen=True)
class ModelSource:
    """A model found.

    Attributes:
        model_id: as given by the user; the demo model's own where none was given.
        revision: of a hub id, "" if none.
        path: local folder, or .gguf file; of a model in several files the first.
        weights: folder of the safetensors files; None: `path`.
        rope_scaling: (type, factor) in place of config.json's; None: that.
        quantize: value of --quantize; None: weights are kept as they are stored.
    """

    model_id: str
    revision: str
    path: Path
    weights: Path | None = None
    rope_scaling: tuple[str, float] | None = None
    quantize: str | None = None

    @property
    def is_gguf(self) -> bool:
        """Whether `path` is one GGUF file instead of a folder."""
        return _is_gguf(self.path) and not self.path.is_dir()


def resolve_model(options: ModelOptions) -> ModelSource:
    """Find a model, downloading it where need be: hub id, local folder or .gguf file, of the hub too; no id at all is the demo model.

    Raises:
        ModelNotFound: one line.
    """
    source = replace(_find(options), quantize=options.quantize)
    if options.weights_cache_override is not None:
        weights = Path(os.path.expanduser(options.weights_cache_override))
        if not any(weights.glob("*.safetensors")):
            raise ModelNotFound(f"--weights-cache-override {options.weights_cache_override} has no .safetensors files")
        source = replace(source, weights=weights)
    if options.rope_scaling is not None and options.rope_factor is not None:
        source = replace(source, rope_scaling=(options.rope_scaling, options.rope_factor))
    return source


def _find(options: ModelOptions) -> ModelSource:
    model_id = options.model_id
    if model_id is None:
        return ModelSource(DEMO_MODEL_ID, "", ensure_demo_model())
    # An empty id, as from an unset variable, would mean the working directory.
    path = Path(os.path.expanduser(model_id or os.devnull))
    is_file = os.path.isfile(path)
    if os.path.isdir(path):
        return ModelSource(model_id, "", _gguf_inside(path) or path)
    if is_file and _is_gguf(path):
        return ModelSource(model_id, "", _first_part(path))
    if is_file:
        raise ModelNotFound(f"{model_id} is a file, but not a .gguf file")
    organisation, name, *inside = model_id.split("/", 2) if "/" in model_id else (model_id, "")
    in_hub = bool(inside) and _is_gguf(path)
    if model_id.startswith((".", "/", "~")) or not name or (_is_gguf(path) and not inside) or (inside and not in_hub):
        raise ModelNotFound(f"there is no file or folder {model_id!r}")
    revision = options.revision or ""
    if in_hub:
        return ModelSource(model_id, revision, fetch_gguf(f"{organisation}/{name}", options.revision, inside[0]))
    with_weights = options.load_format != "dummy" and options.weights_cache_override is None
    folder = fetch_model(model_id, options.revision, with_weights)
    # Repositories of GGUF files often have a config.json too.
    served = (folder / "config.json").is_file() and (not with_weights or any(folder.glob("*.safetensors")))
    file = None if served else only_gguf(model_id, options.revision, folder)
    return ModelSource(model_id, revision, folder if file is None else fetch_gguf(model_id, options.revision, file))


def _is_gguf(path: Path) -> bool:
    return path.suffix.lower() == ".gguf"


def _gguf_inside(folder: Path) -> Path | None:
    """The one .gguf file of a folder that has no config.json.

    Raises:
        ModelNotFound: there are several.
    """
    if (folder / "config.json").exists():
        return None
    files = models_of(path.name for path in folder.iterdir() if _is_gguf(path) and path.is_file())
    if len(files) > 1:
        names = ", ".join(files[:8])
        raise ModelNotFound(f"{folder} has {len(files)} .gguf files and no config.json: --model-id must name one of them ({names})")
    return _first_part(folder / files[0]) if files else None


def _first_part(path: Path) -> Path:
    """The first of the .gguf files of a model, whichever of them is named.

    Raises:
        ModelNotFound: it is not there.
    """
    first = path.with_name(part_names(path.name)[0])
    if not first.exists():
        raise ModelNotFound(f"{first.parent} lacks {first.name}, the first file of the model")
    return first
