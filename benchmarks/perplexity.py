"""Perplexity of the demo model in every format that can be made while it is loaded, beside its unquantized weights.

    python -m benchmarks.perplexity --tokens 30000
    python -m benchmarks.perplexity --tokens 30000 --only float32 --checkpoints /tmp/demo/gptq-64

The text is Python's own reference, which every interpreter ships (pydoc_data.topics). The demo model's file is quantized itself (Q4_1):
its weights are dequantized to float32 first, and "float32" is the model with these. "gptq" is a GPTQ checkpoint of them, of 4 bits, made
by rounding to nearest without calibration; scripts/write_calibrated_checkpoint.py makes calibrated ones. "kv" rows are float32 weights
over a KV cache of that dtype: a token is scored by the keys and values that its window left there.
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from pydoc_data import topics
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from jaxserve import LLM, SamplingParams
from jaxserve.config import ModelOptions
from jaxserve.tokenizer import load_pipeline
from jaxserve.weights import resolve_model
from jaxserve.weights.gguf_file import GGUFCheckpoint

WINDOW = 1024  # tokens that are scored together, from the first on
ON_LOAD = ("fp8", "eetq", "bitsandbytes-nf4", "bitsandbytes-fp4")  # bitsandbytes is the same as eetq


def write_dense(folder: Path, checkpoint: GGUFCheckpoint) -> dict[str, np.ndarray]:
    """The file's model as Hugging Face's folders have it, in float32; returns its tensors."""
    config: dict[str, Any] = {"model_type": "llama"}
    config |= {key: value for key, value in checkpoint.config.items() if key != "quantization_config" and value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps(checkpoint.generation_config))
    shapes = checkpoint.shapes.items()
    tensors = {name: np.ascontiguousarray(checkpoint.read(name, tuple(slice(0, size) for size in shape))) for name, shape in shapes}
    save_file(tensors, folder / "model.safetensors")
    return tensors


def write_gptq(folder: Path, dense: Path, tensors: dict[str, np.ndarray], group: int) -> None:
    """A GPTQ checkpoint of 4 bits with zero points, rounded to nearest."""
    config = json.loads((dense / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": group, "sym": False, "checkpoint_format": "gptq_v2"}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("generation_config.json", "tokenizer.json"):
        (folder / name).write_bytes((dense / name).read_bytes())
    written: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        if "_proj.weight" not in name:
            written[name] = tensor
            continue
        n, k = tensor.shape
        groups = tensor.reshape(n, -1, group)
        low, high = groups.min(2).clip(max=0), groups.max(2).clip(min=0)
        scales = ((high - low) / 15).astype(np.float16)
        wide = scales.astype(np.float32)
        zeros = np.round(-low / wide).clip(0, 15)
        codes = np.round(groups / wide[:, :, None] + zeros[:, :, None]).clip(0, 15).reshape(n, k)
        module = name.removesuffix(".weight")
        written[f"{module}.qweight"] = _words(codes).T.copy()
        written[f"{module}.qzeros"] = _words(zeros.T)
        written[f"{module}.scales"] = scales.T.copy()
        written[f"{module}.g_idx"] = np.arange(k, dtype=np.int32) // group
    save_file(written, folder / "model.safetensors")


def _words(integers: np.ndarray) -> np.ndarray:
    """int32 [n, k / 8] of integers [n, k] of 4 bits."""
    nibbles = integers.astype(np.uint8)
    return np.ascontiguousarray(nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)).view(np.int32)


def perplexity(model: Path, tokens: list[int], **options: Any) -> float:
    """Over windows of a text."""
    limits = dict(max_batch_size=1, max_batch_prefill_tokens=512, max_total_tokens=WINDOW + 8, cpu_kv_cache_gib=0.25)
    with LLM(str(model), **limits, disable_grammar_support=True, prefix_caching=False, **options) as llm:
        windows = [tokens[i : i + WINDOW] for i in range(0, len(tokens) - 1, WINDOW)]
        outputs = llm.generate(windows, SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0))
        scores = [output.prompt_logprobs.raw for output in outputs if output.prompt_logprobs is not None]
    return math.exp(-float(np.concatenate(scores).mean(dtype=np.float64)))


def models(folder: Path, only: list[str]) -> Iterator[tuple[str, Path, dict[str, Any]]]:
    """(name, model, options) of all that is measured."""
    source = resolve_model(ModelOptions())
    checkpoint = GGUFCheckpoint(source.path)
    dense, gptq = folder / "dense", folder / "gptq"
    for made in (dense, gptq):
        made.mkdir()
    pipeline = load_pipeline(source.path)
    assert pipeline is not None, "the demo model has one"
    pipeline.save(str(dense / "tokenizer.json"))
    tensors = write_dense(dense, checkpoint)
    write_gptq(gptq, dense, tensors, group=64)
    cases: list[tuple[str, Path, dict[str, Any]]] = [("float32", dense, {})]
    cases += [(name, dense, {"quantize": name}) for name in ON_LOAD]
    cases += [("gptq", gptq, {}), ("Q4_1 file", source.path, {})]
    cases += [(f"kv {name}", dense, {"kv_cache_dtype": name}) for name in ("fp8_e4m3fn", "fp8_e5m2")]
    yield from (case for case in cases if not only or case[0] in only)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=30000)
    parser.add_argument("--only", nargs="*", default=[], help="names of the rows")
    parser.add_argument("--checkpoints", nargs="*", type=Path, default=[], help="folders of other checkpoints of the demo model")
    parser.add_argument("--keep", type=Path, help="a new folder for the checkpoints that are made")
    args = parser.parse_args()
    pipeline = load_pipeline(resolve_model(ModelOptions()).path)
    assert pipeline is not None, "the demo model has one"
    text = "\n".join(topics.topics[name] for name in sorted(topics.topics))
    tokens = pipeline.encode(text, add_special_tokens=False).ids[: args.tokens]
    print(f"{len(tokens)} tokens of pydoc_data.topics, Python {sys.version.split()[0]}", flush=True)
    plain = 0.0
    with tempfile.TemporaryDirectory() as temporary:
        folder: Path = args.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=args.keep is None)
        others = ((path.name, path, {}) for path in args.checkpoints)
        for name, model, options in chain(models(folder, args.only), others):
            found = perplexity(model, tokens, **options)
            plain = plain or found
            print(f"{name:<18} {found:9.4f} {100 * (found / plain - 1):+7.2f} %", flush=True)


if __name__ == "__main__":
    main()
