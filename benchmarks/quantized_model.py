"""How a benchmark serves a shape with quantized weights."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.gguf_shape import KINDS, write_gguf_shape

# As most W4A16 checkpoints of the hub are: 4 bits, a scale for 128 columns, no zero points.
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False, "checkpoint_format": "gptq_v2"}
_CONFIGS = {
    "w4": GPTQ,
    "w8": {**GPTQ, "bits": 8, "sym": False},
    "fp8_blocks": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    "mxfp4": {"quant_method": "mxfp4"},
}
CHOICES = ("fp8", "eetq", "bitsandbytes", "bitsandbytes-nf4", "bitsandbytes-fp4", *_CONFIGS, *KINDS)


@contextmanager
def quantized_model(folder: Path, quantize: str | None) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The model and the options of an LLM with random weights in a format.

    Args:
        folder: config.json and a tokenizer of a plain checkpoint.
        quantize: one of CHOICES. "w4", "w8" (with zero points), "fp8_blocks" and "mxfp4" are checkpoints, KINDS GGUF files, the others the
            engine's flag; None: as it is.

    Yields:
        (folder or file, options); it is there until the context ends.
    """
    options: dict[str, Any] = {"load_format": "dummy"}
    if quantize not in (*_CONFIGS, *KINDS):
        yield folder, options | ({} if quantize is None else {"quantize": quantize})
        return
    with tempfile.TemporaryDirectory() as made:
        if quantize in KINDS:
            write_gguf_shape(folder, quantize, file := Path(made) / f"{quantize}.gguf")
            yield file, options
            return
        for path in folder.iterdir():
            if path.is_file() and path.suffix != ".safetensors":
                (Path(made) / path.name).write_bytes(path.read_bytes())
        config = json.loads((folder / "config.json").read_text())
        (Path(made) / "config.json").write_text(json.dumps({**config, "quantization_config": _CONFIGS[quantize]}))
        yield Path(made), options
