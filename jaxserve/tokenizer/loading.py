"""Where a tokenizer comes from: a Hugging Face folder or the metadata of a .gguf file."""

import json
import os
from pathlib import Path
from typing import Any

import tokenizers

from jaxserve.errors import ModelNotFound, StartupError
from jaxserve.tokenizer.gguf import load_gguf_pipeline, load_gguf_tokenizer
from jaxserve.tokenizer.tokenizer import Tokenizer


def import_transformers() -> None:
    """Import what `load_tokenizer` needs: it takes seconds, so a server does it while the model loads."""
    # It tells everybody on stderr that it cannot find PyTorch, which is as it should be.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers.models.auto.tokenization_auto  # noqa: F401  for the seconds alone


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


def load_pipeline(path: Path) -> tokenizers.Tokenizer | None:
    """Load what does a tokenizer's work, without transformers where its files suffice: importing that takes seconds of the GIL.

    Args:
        path: as for load_tokenizer.

    Returns:
        None where the tokenizer is of another kind.

    Raises:
        StartupError: as load_tokenizer.
    """
    if path.is_file():
        return load_gguf_pipeline(path)
    try:
        pipeline = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
        settings = json.loads((path / "tokenizer_config.json").read_text())
        added = {entry["content"] for entry in settings.get("added_tokens_decoder", {}).values()}
        if added <= pipeline.get_vocab(with_added_tokens=True).keys():
            return pipeline
    except Exception:  # whatever is missing or odd there, transformers may know what to do, or says what is wrong
        pass
    return load_tokenizer(path).pipeline


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
