"""Where a tokenizer comes from: a Hugging Face folder or the metadata of a .gguf file."""

import json
import os
from pathlib import Path
from typing import Any

from jaxserve.errors import ModelNotFound, StartupError
from jaxserve.tokenizer.gguf import load_gguf_tokenizer
from jaxserve.tokenizer.tokenizer import Tokenizer


def import_transformers() -> None:
    """Import what `load_tokenizer` needs: it takes seconds, so a server does it while the model loads."""
    # It tells everybody on stderr that it cannot find PyTorch, which is as it should be.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers.models.auto.tokenization_auto  # noqa: F401


def load_tokenizer(path: Path, tokenizer_config_path: str | None = None) -> Tokenizer:
    """Load the tokenizer of a model. Code from the folder is never run.

    Args:
        path: a folder with tokenizer files, or a .gguf file.
        tokenizer_config_path: a tokenizer_config.json whose chat template replaces the model's.

    Raises:
        StartupError: no tokenizer there, or one that cannot be read; one line.
    """
    inner = load_gguf_tokenizer(path) if path.is_file() else _load_folder(path)
    if tokenizer_config_path is not None:
        inner.chat_template = _read_chat_template(Path(tokenizer_config_path))
    return Tokenizer(inner)


def _load_folder(path: Path) -> Any:
    if not path.is_dir():
        raise ModelNotFound(f"{path} is neither a folder nor a .gguf file")
    import_transformers()
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # whatever a broken file makes it raise, the user needs one line
        reason = " ".join(str(error).split())[:300]
        raise StartupError(f"cannot load the tokenizer in {path}: {reason or type(error).__name__}") from error


def _read_chat_template(path: Path) -> str | dict[str, str]:
    try:
        template = json.loads(path.read_text())["chat_template"]
        if isinstance(template, list):
            return {str(entry["name"]): str(entry["template"]) for entry in template}
    except OSError as error:
        raise StartupError(f"--tokenizer-config-path: {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise StartupError(f"--tokenizer-config-path: {path} is not JSON with a `chat_template`") from error
    if not isinstance(template, str):
        raise StartupError(f"--tokenizer-config-path: the `chat_template` in {path} is neither text nor a list of named texts")
    return template
