"""Peak memory of loading a checkpoint, from /proc: RSS (VmHWM) and PSS (sampled), against the model and its largest file.

    python -m benchmarks.loading_memory                    # writes and loads 2 GB of float32 in 8 files
    python -m benchmarks.loading_memory --model FOLDER     # a model folder or .gguf file of your own
    python -m benchmarks.loading_memory --mesh 1x4 --config FOLDER/config.json --layers 2 --dtype float16 --load-dtype float16

The last makes a few layers of a shape that is too large to be written whole, and loads them on four devices: on the CPU fake ones,
XLA_FLAGS=--xla_force_host_platform_device_count=4. The bar: what the devices hold, where their memory is the host's, plus one file. Files
in bfloat16 are converted on the devices, which on the CPU takes the host's memory.
"""

import argparse
import json
import math
import re
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from jaxserve.config import parse_mesh

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
}


def write_checkpoint(folder: Path, config: dict[str, Any], files: int, dtype: np.dtype) -> None:
    """Weights of a Llama in `files` files: a block of random numbers again and again."""
    hidden = config["hidden_size"]
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]
    layer = layer_shapes(config)
    shapes |= {f"model.layers.{i}.{name}.weight": shape for i in range(config["num_hidden_layers"]) for name, shape in layer.items()}
    names = list(shapes)
    weight_map = {name: f"model-{i * files // len(names) + 1:05}-of-{files:05}.safetensors" for i, name in enumerate(names)}
    block = np.random.default_rng(0).random(1 << 20, np.float32).astype(dtype)
    for file in sorted(set(weight_map.values())):
        save_file({name: np.resize(block, shapes[name]) for name in names if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))


def layer_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Of the tensors of a layer."""
    hidden, inner, heads = (config[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads"))
    head_dim = config.get("head_dim", hidden // heads)
    queries, keys = heads * head_dim, config["num_key_value_heads"] * head_dim
    return {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }


def layers_of(gigabytes: float, dtype: np.dtype) -> int:
    """How many layers of CONFIG make a checkpoint of so many GB."""
    size = sum(math.prod(shape) for shape in layer_shapes(CONFIG).values()) * dtype.itemsize
    return round((gigabytes * 1e9 - CONFIG["vocab_size"] * CONFIG["hidden_size"] * dtype.itemsize) / size)


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


def measure(model_id: str, mesh_size: int, dtype: str) -> None:
    """Load on so many devices and print the figures."""
    import jax

    from jaxserve.config import ModelOptions
    from jaxserve.runner import make_mesh
    from jaxserve.weights import resolve_model
    from jaxserve.weights.loader import load_model

    options = ModelOptions(model_id=model_id, dtype=dtype)
    source = resolve_model(options)
    mesh = make_mesh(mesh_size)
    jax.block_until_ready(jax.device_put(0.0, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())))
    files = [source.path] if source.is_gguf else list(source.path.glob("*.safetensors"))
    largest = max(path.stat().st_size for path in files)
    started = time.perf_counter()
    with Memory() as memory:
        model = load_model(source, options, mesh)
        jax.block_until_ready(model.leaves)
    seconds = time.perf_counter() - started
    shards = [shard for leaf in model.leaves for shard in leaf.addressable_shards]
    devices = [sum(shard.data.nbytes for shard in shards if shard.device == device) for device in mesh.devices.flat]
    on_host = sum(devices) if mesh.devices.flat[0].platform == "cpu" else 0  # whose devices' memory is the host's
    allowed = memory.rss_before + on_host + largest
    read = sum(path.stat().st_size for path in files)
    print(f"loaded {_gb(read)} in {len(files)} files on {mesh_size} {mesh.devices.flat[0].device_kind} in {seconds:.1f} s")
    print(f"before {_gb(memory.rss_before)}, model {_gb(model.nbytes)}, on each device {_gb(min(devices))} to {_gb(max(devices))}")
    print(f"peak RSS {_gb(memory.peak_rss)}, peak PSS {_gb(memory.peak_pss)}; beside the process and its devices the host")
    print(f"held {_gb(memory.peak_rss - memory.rss_before - on_host)}, the largest file has {_gb(largest)}: ", end="")
    print("within" if memory.peak_rss <= allowed else "ABOVE")


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def main() -> None:
    """Measure a checkpoint that is given, or one that is made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model folder or .gguf file")
    parser.add_argument("--config", type=Path, help="config.json of the Llama whose shape is made, instead of --gigabytes")
    parser.add_argument("--layers", type=int, default=2, help="of it")
    parser.add_argument("--vocab-size", type=int, help="of it [as config.json says]")
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--files", type=int, default=8)
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="of the files")
    parser.add_argument("--load-dtype", default="auto", help="the server's --dtype")
    parser.add_argument("--mesh", default="1x1", help="1xT: T devices share the model")
    arguments = parser.parse_args()
    _, mesh_size = parse_mesh(arguments.mesh)
    if arguments.model:
        measure(arguments.model, mesh_size, arguments.load_dtype)
        return
    dtype = np.dtype(ml_dtypes.bfloat16 if arguments.dtype == "bfloat16" else arguments.dtype)
    config = CONFIG | {"num_hidden_layers": layers_of(arguments.gigabytes, dtype)}
    if arguments.config:
        config = json.loads(arguments.config.read_text()) | {"num_hidden_layers": arguments.layers}
        config |= {"vocab_size": arguments.vocab_size or config["vocab_size"]}
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), config, arguments.files, dtype)
        measure(folder, mesh_size, arguments.load_dtype)


if __name__ == "__main__":
    main()
