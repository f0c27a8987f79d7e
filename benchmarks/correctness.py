"""Whether serving is right on this device: logits by position, answers under load, every bucket at its edge. One start for all.

    python -m benchmarks.correctness FOLDER [--parts golden logits load edges] [--layers 4] [--longest 16384] [--attention triton]

FOLDER holds a config.json of a Llama; the weights are random, and the same on every --mesh: the reference always has one device.
With the 8B's widths and 4 layers it is first held against goldens/llama_8b_4_layers.npz. `--layers 0 --parts edges --fill` is the test
of memory: the whole model, the cache that a server would have. Prints lines as it goes; the last says whether all is within the
bounds, as does the exit code.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from jax.sharding import Mesh

from benchmarks.edges import check_edges
from benchmarks.logits import MAX_REFERENCE_ERROR, Reference, check_logits
from benchmarks.plain_llama import GOLDEN_LAYERS, WEIGHT_BOUND
from benchmarks.under_load import check_under_load
from jaxserve.config import EngineOptions, ModelOptions, limit_gpu_memory
from jaxserve.engine.build import join
from jaxserve.models import Model
from jaxserve.request import EngineInfo
from jaxserve.runner import ModelRunner, RunnerConfig, make_mesh
from jaxserve.runner.exchange import reach_each_other
from jaxserve.weights import ModelSource
from jaxserve.weights.loader import open_model

PARTS = ("golden", "logits", "load", "edges")
KV_GIB = 12  # where the reference needs memory beside the cache


def is_golden_shape(shape: dict) -> bool:
    """Whether the golden is of a model like this."""
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size", "num_hidden_layers")
    return tuple(shape[name] for name in sizes) == (4096, 14336, 32, 8, 128256, GOLDEN_LAYERS)


def main() -> None:
    """Read the arguments and check."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--layers", type=int, default=GOLDEN_LAYERS, help="of the model; 0: as config.json says")
    parser.add_argument("--longest", type=int, default=16384, help="tokens of the longest prompt")
    parser.add_argument("--requests", type=int, default=48, help="that are checked under load")
    parser.add_argument("--output-tokens", type=int, default=64, help="of each")
    parser.add_argument("--noise", type=int, default=160, help="requests beside them")
    parser.add_argument("--fill", action="store_true", help="edges: fill the whole KV cache too")
    parser.add_argument("--mesh", default="1x1", help="the engine's flag, 1xT")
    parser.add_argument("--disable-custom-all-reduce", action="store_true", help="likewise")
    parser.add_argument("--disable-grammar-support", action="store_true", help="likewise; fewer programs")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--deterministic", action="store_true", help="the engine's flag; load: no bit may differ")
    parser.add_argument("--max-batch-size", type=int)
    parser.add_argument("--max-batch-prefill-tokens", type=int)
    arguments = parser.parse_args()
    shape = json.loads((arguments.folder / "config.json").read_text())
    shape["num_hidden_layers"] = arguments.layers or shape["num_hidden_layers"]
    options = EngineOptions(
        attention=arguments.attention,
        deterministic=arguments.deterministic,
        mesh=arguments.mesh,
        disable_grammar_support=arguments.disable_grammar_support,
        disable_custom_all_reduce=arguments.disable_custom_all_reduce,
        prefix_caching=False,
        max_batch_size=arguments.max_batch_size,
        max_batch_prefill_tokens=arguments.max_batch_prefill_tokens,
        # Edges alone are those of a server with default flags.
        max_total_tokens=None if set(arguments.parts) == {"edges"} else min(arguments.longest + 256, shape["max_position_embeddings"]),
    )
    limit_gpu_memory(options)
    begin = time.perf_counter()

    def say(line: str) -> None:
        print(f"{time.perf_counter() - begin:6.1f} s  {line}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(shape))
        mesh, one = make_mesh(options.tensor_size), make_mesh(1)
        source = ModelSource("random", "", Path(folder))
        options_of_model = ModelOptions(load_format="dummy", dtype=arguments.dtype)

        def load(mesh: Mesh) -> Model:
            opened = open_model(source, options_of_model, mesh, attention=options.attention)
            return replace(opened, dummy_bound=WEIGHT_BOUND).load(mesh)

        model = load(mesh)
        say("the weights are there")
        whole = load(one) if {"golden", "logits"} & set(arguments.parts) and mesh.size > 1 else model
    device = mesh.devices.flat[0]
    config = RunnerConfig.from_options(options, device.platform, str(options.compilation_cache))
    if {"golden", "logits"} & set(arguments.parts) and config.kv_bytes is None:
        config = replace(config, kv_bytes=KV_GIB * 2**30)
    sums = "the kernel over peer memory" if config.peer_memory and reach_each_other(mesh) else "XLA"
    runner = ModelRunner(model, mesh, config)
    runner.warmup()
    say(f"ready on {mesh.size} x {device.device_kind}, {model.dtype}, sums by {sums}")
    good = True
    if "golden" in arguments.parts and is_golden_shape(shape):
        error = Reference(whole, shape).error_to_golden()
        say(f"the reference is {error:.1e} from float64")
        good &= error <= MAX_REFERENCE_ERROR
    if "logits" in arguments.parts:
        good &= check_logits(runner, config, whole, shape, min(arguments.longest, runner.max_total_tokens), say)
    info = EngineInfo(
        model_id="random",
        revision="",
        model_path="",
        vocab_size=model.config.vocab_size,
        max_total_tokens=runner.max_total_tokens,
        max_input_tokens=runner.max_total_tokens - 1,
        eos_token_ids=(),
        page_size=options.page_size,
        num_pages=runner.kv_groups[0][0],
        mesh=options.mesh,
        dtype=str(model.dtype),
        device=device.device_kind,
        defaults={},
    )
    if "load" in arguments.parts:
        longest = min(arguments.longest // 4, runner.max_total_tokens - 2 * arguments.output_tokens)
        sizes = arguments.requests, longest, arguments.output_tokens, arguments.noise
        good &= check_under_load(join(runner, config, options, info), *sizes, say, bitwise=arguments.deterministic)
    if "edges" in arguments.parts:
        good &= check_edges(join(runner, config, options, info), config, runner.buckets, arguments.fill, say)
    say("within the bounds" if good else "OUT OF THE BOUNDS")
    sys.exit(not good)


if __name__ == "__main__":
    main()
