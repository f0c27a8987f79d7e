"""How a benchmark serves a shape with quantized weights."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# As most W4A16 checkpoints of the hub are: 4 bits, a scale for 128 columns, no zero points.
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False, "checkpoint_format": "gptq_v2"}
_CONFIGS = {"w4": GPTQ, "mxfp4": {"quant_method": "mxfp4"}}
CHOICES = ("fp8", "eetq", "bitsandbytes-nf4", *_CONFIGS)


@contextmanager
def quantized_model(folder: Path, quantize: str | None) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The model and the options of an LLM with random weights in a format.

    Args:
        folder: config.json and a tokenizer of a plain checkpoint.
        quantize: "fp8", "eetq" and "bitsandbytes-nf4": the engine's flag; "w4" and "mxfp4": the folder beside it is a checkpoint's of
            GPTQ or in MXFP4; None: as it is.

    Yields:
        (folder, options); the folder is there until the context ends.
    """
    options: dict[str, Any] = {"load_format": "dummy"}
    if quantize not in _CONFIGS:
        yield folder, options | ({} if quantize is None else {"quantize": quantize})
        return
    with tempfile.TemporaryDirectory() as made:
        for path in folder.iterdir():
            if path.is_file() and path.suffix != ".safetensors":
                (Path(made) / path.name).write_bytes(path.read_bytes())
        config = json.loads((folder / "config.json").read_text())
        (Path(made) / "config.json").write_text(json.dumps({**config, "quantization_config": _CONFIGS[quantize]}))
        yield Path(made), options
