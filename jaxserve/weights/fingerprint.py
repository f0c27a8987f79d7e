"""Fingerprints of model files, to find out whether two machines hold the same model without reading all of it. Imports no JAX."""

import hashlib
import os
from pathlib import Path

from jaxserve.errors import ModelNotFound
from jaxserve.weights.gguf_parts import part_names
from jaxserve.weights.source import ModelSource

_CONFIGS = ("config.json", "generation_config.json", "quantize_config.json", "quant_config.json", "hf_quant_config.json")
_BLOCK = 4096  # bytes
_NUM_BLOCKS = 64  # of each weights file


def fingerprint(source: ModelSource, with_weights: bool = True) -> str:
    """A digest of what decides the tokens: configs whole; of each weights file its size, its beginning and blocks all over it.

    Two trainings of one shape differ nearly everywhere, so some blocks tell them apart. It is no protection against tampering.

    Args:
        with_weights: False where they are made up.

    Returns:
        16 hexadecimal digits.

    Raises:
        ModelNotFound: a file cannot be read.
    """
    digest = hashlib.sha256(repr(source.rope_scaling).encode())
    try:
        if source.is_gguf:
            for name in part_names(source.path.name):
                _add_blocks(digest, source.path.with_name(name))
        else:
            for path in (source.path / name for name in _CONFIGS):
                if path.is_file():
                    digest.update(path.name.encode() + b"\0" + path.read_bytes())
            for path in sorted((source.weights or source.path).glob("*.safetensors")) if with_weights else ():
                digest.update(path.name.encode() + b"\0")
                _add_blocks(digest, path)
    except OSError as error:
        raise ModelNotFound(f"{error.filename} cannot be read: {error.strerror}") from None
    return digest.hexdigest()[:16]


def _add_blocks(digest: "hashlib._Hash", path: Path) -> None:
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(size.to_bytes(8))
        for i in range(_NUM_BLOCKS):
            file.seek(size * i // _NUM_BLOCKS)
            digest.update(file.read(_BLOCK))
