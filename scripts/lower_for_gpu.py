"""Lower a model's programs for a GPU that this machine need not have, and name those that do not.

    JAX_PLATFORMS=cpu python scripts/lower_for_gpu.py FOLDER --device-kind "NVIDIA L4" --num-cores 58 --mesh 1x2 --quantize fp8

FOLDER needs a config.json alone. A kernel that does not take a shape, a dtype or a cut fails here, and no run on a CPU shows it. What the
GPU's compiler refuses (too much shared memory, too many registers) does not show. Takes a second or two a program of a short model:
--num-layers 1 is enough where all layers are alike. Ends with 1 if a program failed.
"""

import argparse
import json
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh

from jaxserve.config import EngineOptions
from jaxserve.errors import StartupError
from jaxserve.models import Architecture, ModelConfig, check_attention
from jaxserve.pallas_kernels import attention_dtype
from jaxserve.runner import RunnerConfig
from jaxserve.runner.blueprint import Blueprint
from jaxserve.runner.kv_cache import plan_kv_cache
from jaxserve.runner.lowering import lower
from jaxserve.runner.mesh import make_mesh
from jaxserve.runner.programs import Programs


def main() -> int:
    arguments = _read_arguments()
    warnings.simplefilter("ignore", DeprecationWarning)  # Pallas-Triton is deprecated
    try:
        programs = Programs(_blueprint(arguments))
    except StartupError as error:
        print(error, file=sys.stderr)
        return 1
    failed = 0
    for key in programs:
        if arguments.programs and key.name not in arguments.programs:
            continue
        begin = time.monotonic()
        try:
            told = f"{len(lower(programs[key], 'cuda'))} bytes"
        except Exception as error:  # whatever a kernel's author did not think of
            failed += 1
            told = f"FAILED: {type(error).__name__}: {error}".replace("\n", " ")
        print(f"{key.name}: {told}, {time.monotonic() - begin:.1f} s", flush=True)
    return int(failed > 0)


def _blueprint(arguments: argparse.Namespace) -> Blueprint:
    """What a server with these flags would compile on such GPUs."""
    options = EngineOptions(
        mesh=arguments.mesh,
        page_size=arguments.page_size,
        attention=arguments.attention,
        kv_cache_dtype=arguments.kv_cache_dtype,
        max_batch_size=arguments.max_batch_size,
        max_batch_prefill_tokens=arguments.max_batch_prefill_tokens,
        deterministic=arguments.deterministic,
        disable_custom_all_reduce=arguments.disable_custom_all_reduce,
    )
    written = json.loads((arguments.folder / "config.json").read_text())
    if arguments.num_layers:
        written["num_hidden_layers"] = arguments.num_layers
    model = ModelConfig.from_hf(written, quantize=arguments.quantize)
    dtype, shards = jnp.dtype(arguments.dtype), options.tensor_size
    config = RunnerConfig.from_options(options, "gpu")
    kv_dtype = attention_dtype(dtype) if options.kv_dtype is None else jnp.dtype(options.kv_dtype)
    plan = plan_kv_cache(model, config, shards, kv_dtype, arguments.kv_gib << 30)
    device = AbstractDevice(arguments.device_kind, arguments.num_cores, "gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("tensor",), abstract_device=device)):
        check_attention(model, options.attention, attention_dtype(dtype), kv_dtype, options.page_size, shards)
    here = Blueprint.of(Architecture.of(model, options.attention), dtype, make_mesh(1), plan, config)
    gpu = dict(device_kind=arguments.device_kind, num_cores=arguments.num_cores, device_platform="gpu", platform="cuda")
    return replace(here, **gpu, tensor_size=shards, peer_memory=shards > 1 and config.peer_memory)


def _read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device-kind", default="NVIDIA H200", help="as JAX calls it")
    parser.add_argument("--num-cores", type=int, default=132, help="multiprocessors")
    parser.add_argument("--kv-gib", type=int, default=16, help="memory for the KV cache on each GPU")
    parser.add_argument("--num-layers", type=int, help="instead of config.json's")
    parser.add_argument("--programs", nargs="*", help='only these, such as "forward-8x8-decode"')
    parser.add_argument("--dtype", default="bfloat16")
    for name in ("mesh", "page_size", "attention", "kv_cache_dtype", "max_batch_size", "max_batch_prefill_tokens"):
        default = getattr(EngineOptions(), name)
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, default=default, type=int if default is None else type(default), help="as jaxserve's")
    parser.add_argument("--quantize", help="as jaxserve's")
    for name in ("deterministic", "disable_custom_all_reduce"):
        parser.add_argument("--" + name.replace("_", "-"), action="store_true", help="as jaxserve's")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
