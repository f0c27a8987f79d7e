"""Peak memory of loading a checkpoint, from /proc: RSS (VmHWM) and PSS (sampled), against the model and its largest file.

    python benchmarks/loading_memory.py                    # writes and loads 2 GB of float32 in 8 files
    python benchmarks/loading_memory.py --model FOLDER     # a model folder or .gguf file of your own

The bar: the model plus one file.
"""

import argparse
import json
import re
import tempfile
import threading
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
}


def write_checkpoint(folder: Path, gigabytes: float, files: int, dtype: np.dtype) -> None:
    """Random weights of `gigabytes` GB in `files` files."""
    hidden, inner, kv = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["hidden_size"] // 4
    layer = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    outer = {"model.embed_tokens.weight": (CONFIG["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    size = sum(int(np.prod(shape)) for shape in layer.values()) * dtype.itemsize
    layers = round((gigabytes * 1e9 - CONFIG["vocab_size"] * hidden * dtype.itemsize) / size)
    shapes = outer | {f"model.layers.{i}.{name}.weight": shape for i in range(layers) for name, shape in layer.items()}
    names = list(shapes)
    weight_map = {name: f"model-{i * files // len(names) + 1:05}-of-{files:05}.safetensors" for i, name in enumerate(names)}
    random = np.random.default_rng(0)
    for file in sorted(set(weight_map.values())):
        held = [name for name in names if weight_map[name] == file]
        save_file({name: random.random(shapes[name], np.float32).astype(dtype) for name in held}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))


class Memory:
    """This process's memory in bytes while the block runs; PSS is sampled every 5 ms."""

    def __enter__(self) -> "Memory":
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        self.rss_before, self.peak_pss, self._running = _status("VmRSS"), 0, True
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._running = False
        self._thread.join()
        self.peak_rss = _status("VmHWM")

    def _sample(self) -> None:
        while self._running:
            self.peak_pss = max(self.peak_pss, _number(Path("/proc/self/smaps_rollup").read_text(), "Pss"))
            time.sleep(0.005)


def _status(field: str) -> int:
    return _number(Path("/proc/self/status").read_text(), field)


def _number(text: str, field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)
    assert match
    return int(match[1]) * 1024


def measure(model_id: str) -> None:
    """Load on one CPU device and print the figures."""
    import jax

    from jaxserve.config import ModelOptions
    from jaxserve.weights import resolve_model
    from jaxserve.weights.loader import load_model

    options = ModelOptions(model_id=model_id)
    source = resolve_model(options)
    mesh = jax.make_mesh((1, 1), ("data", "tensor"))
    jax.block_until_ready(jax.numpy.zeros(1))
    files = [source.path] if source.is_gguf else list(source.path.glob("*.safetensors"))
    largest = max(path.stat().st_size for path in files)
    started = time.perf_counter()
    with Memory() as memory:
        model = load_model(source, options, mesh)
        jax.block_until_ready(model.leaves)
    seconds = time.perf_counter() - started
    allowed = memory.rss_before + model.nbytes + largest
    read = sum(path.stat().st_size for path in files)
    before, held, peak, pss = (f"{size / 1e9:.2f} GB" for size in (memory.rss_before, model.nbytes, memory.peak_rss, memory.peak_pss))
    print(f"loaded {read / 1e9:.2f} GB in {len(files)} files in {seconds:.1f} s")
    print(f"before {before}, model {held}, largest file {largest / 1e9:.2f} GB: {allowed / 1e9:.2f} GB allowed")
    print(f"peak RSS {peak}, peak PSS {pss}: {'within' if memory.peak_rss <= allowed else 'ABOVE'}")


def main() -> None:
    """Measure a checkpoint that is given, or one that is made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model folder or .gguf file")
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--files", type=int, default=8)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    if args.model:
        measure(args.model)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), args.gigabytes, args.files, np.dtype(np.float32 if args.dtype == "float32" else ml_dtypes.bfloat16))
        measure(folder)


if __name__ == "__main__":
    main()
