"""How a benchmark serves a shape with quantized weights."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# As most W4A16 checkpoints of the hub are: 4 bits, a scale for 128 columns, no zero points.
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False, "checkpoint_format": "gptq_v2"}
CHOICES = ("fp8", "eetq", "w4")


@contextmanager
def quantized_model(folder: Path, quantize: str | None) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The model and the options of an LLM with random weights in a format.

    Args:
        folder: config.json and a tokenizer of a plain checkpoint.
        quantize: "fp8" and "eetq": the engine's flag; "w4": the folder beside it is a GPTQ checkpoint's; None: as it is.

    Yields:
        (folder, options); the folder is there until the context ends.
    """
    options: dict[str, Any] = {"load_format": "dummy"}
    if quantize != "w4":
        yield folder, options | ({} if quantize is None else {"quantize": quantize})
        return
    with tempfile.TemporaryDirectory() as made:
        for path in folder.iterdir():
            if path.is_file() and path.suffix != ".safetensors":
                (Path(made) / path.name).write_bytes(path.read_bytes())
        config = json.loads((folder / "config.json").read_text())
        (Path(made) / "config.json").write_text(json.dumps({**config, "quantization_config": GPTQ}))
        yield Path(made), options
