"""Write a calibrated checkpoint of a Llama model, of 4 bits, on a CPU: GPTQ's error feedback, in GPTQ's format or as bitsandbytes' nf4.

Run by hand in the Python 3.11 environment of write_quantized_goldens.py; not part of the tests:

    python -m benchmarks.perplexity --tokens 2 --only float32 --keep /tmp/demo          # writes /tmp/demo/dense
    python3.11 scripts/write_calibrated_checkpoint.py /tmp/demo/dense /tmp/demo/gptq-64 --group 64 --desc-act
    python3.11 scripts/write_calibrated_checkpoint.py /tmp/demo/dense /tmp/demo/nf4 --format nf4
    python -m benchmarks.perplexity --tokens 30000 --only float32 --checkpoints /tmp/demo/gptq-64 /tmp/demo/nf4

Calibration is on what packages of that environment ship: docstrings of the standard library and the READMEs in packages' metadata,
half each. A window that has 20 tokens in a row with the text of benchmarks.perplexity in common is left out. Layers are quantized in
their order, each with activations that the quantized layers before it make. Activations are computed with bfloat16 products.

AutoGPTQ quantizes and packs GPTQ. nf4 has the same feedback with another quantizer: blocks of 64 columns, whose scales are chosen before
by least squared error, weighted with the mean square of each column's activations; columns with the largest come first.
"""

import argparse
import ast
import contextlib
import functools
import importlib
import json
import random
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data import topics

import torch  # pyright: ignore[reportMissingImports]
from bitsandbytes.functional import QuantState, dequantize_4bit, get_4bit_type  # pyright: ignore[reportMissingImports]
from safetensors.torch import save_file  # pyright: ignore[reportMissingImports]
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM  # pyright: ignore[reportMissingImports]
from write_quantized_goldens import package_without_init

WINDOW, SHARED = 1024, 20  # tokens
FACTORS = [0.6 + 0.025 * step for step in range(21)]  # of a block's largest element, for its scale
# Modules of a layer that take the same activations.
MODULES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


class Stop(Exception):
    """The activations that were wanted are there."""


def docstrings() -> Iterator[str]:
    """The long ones of the standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if {"test", "tests", "pydoc_data", "site-packages", "lib2to3", "idlelib"} & set(path.parts):
            continue
        try:
            nodes = ast.walk(ast.parse(path.read_text()))
        except (SyntaxError, UnicodeDecodeError):
            continue
        found = (ast.get_docstring(node) for node in nodes if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef))
        yield from (text for text in found if text and len(text) > 300)


def readmes() -> Iterator[str]:
    """The descriptions in packages' metadata."""
    for path in sorted(Path(sysconfig.get_paths()["purelib"]).glob("*.dist-info/METADATA")):
        text = path.read_text().partition("\n\n")[2]
        if len(text) > 500:
            yield text


def calibration(tokenizer: Tokenizer, count: int) -> torch.Tensor:
    """int64 [count, WINDOW]."""

    def runs(ids: list[int]) -> set[tuple[int, ...]]:
        return {tuple(ids[i : i + SHARED]) for i in range(len(ids) - SHARED + 1)}

    measured = runs(tokenizer.encode("\n".join(topics.topics[name] for name in sorted(topics.topics)), add_special_tokens=False).ids)
    chosen: list[list[int]] = []
    for source, wanted in ((docstrings, count - count // 2), (readmes, count // 2)):
        texts = list(source())
        random.Random(0).shuffle(texts)
        ids = tokenizer.encode("\n\n".join(texts), add_special_tokens=False).ids
        windows = [ids[i : i + WINDOW] for i in range(0, len(ids) - WINDOW + 1, WINDOW)]
        windows = [window for window in windows if not runs(window) & measured]
        assert len(windows) >= wanted, f"{source.__name__}: {len(windows)} windows"
        chosen += windows[:wanted]
    return torch.tensor(chosen)


@functools.cache
def auto_gptq() -> tuple[type, type]:
    """AutoGPTQ's GPTQ (Frantar et al. 2022, arXiv 2210.17323) and QuantLinear; its packages' __init__ need another transformers."""
    for name in ("auto_gptq", "auto_gptq.quantization"):
        package_without_init(name)
    for name in ("auto_gptq.nn_modules", "auto_gptq.nn_modules.qlinear"):
        importlib.import_module(name)
    torch.cuda.synchronize = lambda: None  # which it calls wherever it runs
    packing = importlib.import_module("auto_gptq.nn_modules.qlinear.qlinear_cuda")
    return importlib.import_module("auto_gptq.quantization.gptq").GPTQ, packing.QuantLinear


class NormalFloat:
    """Quantizes as nf4, in the place of AutoGPTQ's Quantizer. It makes a copy for each group, in order.

    Args:
        weights: of the columns of each group that is still to come.
    """

    def __init__(self, weights: Iterator[torch.Tensor]):
        self.weights = weights
        self.table = get_4bit_type("nf4", device="cpu")
        self.borders = (self.table[1:] + self.table[:-1]) / 2

    def __deepcopy__(self, memo: dict[int, object]) -> "NormalFloat":
        return NormalFloat(self.weights)

    def ready(self) -> bool:
        """Whether ranges are known, as far as AutoGPTQ needs to know."""
        return True

    def codes(self, x: torch.Tensor) -> torch.Tensor:
        """Indices of the nearest entries of the table."""
        return torch.bucketize(x / self.scale, self.borders, out_int32=True)

    def quantize(self, x: torch.Tensor) -> torch.Tensor:
        """x [n, columns] of one group."""
        return self.table[self.codes(x)] * self.scale

    def find_params(self, x: torch.Tensor, weight: bool) -> None:
        """Choose a scale [n, 1] for each row of a group."""
        del weight
        importance = next(self.weights)
        largest = x.abs().amax(1, keepdim=True).clamp_min(1e-12)
        errors, candidates = [], [largest * factor for factor in FACTORS]
        for self.scale in candidates:
            errors.append(((self.quantize(x) - x) ** 2 * importance).sum(1, keepdim=True))
        self.scale = torch.cat(candidates, 1).gather(1, torch.cat(errors, 1).argmin(1, keepdim=True))
        self.zero = torch.zeros_like(self.scale)


def bitsandbytes_tensors(name: str, quantized: torch.Tensor, scales: torch.Tensor) -> dict[str, torch.Tensor]:
    """A module as bitsandbytes stores it, of its weights [n, k] on the grid of scales [n, k / 64].

    Raises:
        AssertionError: bitsandbytes makes something else of the tensors.
    """
    grid = NormalFloat(iter(()))
    grid.scale = scales.reshape(-1, 1)
    codes = grid.codes(quantized.reshape(-1, 64)).to(torch.uint8).reshape(-1, 2)
    packed = (codes[:, :1] << 4) | codes[:, 1:]
    state = QuantState(scales.flatten(), quantized.shape, grid.table, 64, "nf4", torch.float32)
    assert torch.allclose(dequantize_4bit(packed, state), quantized, rtol=1e-6, atol=0)
    tensors = state.as_dict(packed=True)
    return {f"{name}.weight": packed} | {f"{name}.weight.{part}": tensor.contiguous() for part, tensor in tensors.items()}


class Layer:
    """A decoder layer and what goes into it."""

    def __init__(self, layer: torch.nn.Module, positions: tuple[torch.Tensor, torch.Tensor]):
        self.layer, self.positions = layer, positions
        self.modules = dict(layer.named_modules())

    def forward(self, x: torch.Tensor) -> None:
        """Replace what goes in by what comes out, a few windows at a time."""
        for part in x.split(8):
            part.copy_(self._layer(part))

    def _layer(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.layer(x, position_embeddings=self.positions)

    def quantize(self, x: torch.Tensor, args: argparse.Namespace) -> dict[str, torch.Tensor]:
        """Quantize the layer's modules in their order; returns their tensors."""
        GPTQ, QuantLinear = auto_gptq()
        written: dict[str, torch.Tensor] = {}
        for names in MODULES:
            gathered = {name: GPTQ(self.modules[name]) for name in names}
            self._gather(x, names[0], list(gathered.values()))
            for name, state in gathered.items():
                linear = self.modules[name]
                if args.format == "nf4":
                    state.quantizer = NormalFloat(iter(state.H.diagonal().split(64)))
                    scales, _, _ = state.fasterquant(64, args.damp, 64, actorder=True, static_groups=True)
                    written |= bitsandbytes_tensors(name, linear.weight.data, scales)
                    continue
                state.quantizer.configure(4, perchannel=True, sym=args.sym, mse=args.mse)
                # Blocks are groups: AutoGPTQ takes a group's range before the errors of its block are fed back.
                scales, zeros, indices = state.fasterquant(args.group, args.damp, args.group, args.desc_act, args.static_groups)
                assert bool((zeros >= 1).all()), "version 1 cannot store zero points of 0"
                packed = QuantLinear(4, args.group, linear.in_features, linear.out_features, False, kernel_switch_threshold=0)
                packed.pack(linear, scales.half(), zeros, indices)
                written |= {f"{name}.{part}": getattr(packed, part) for part in ("qweight", "qzeros", "g_idx")}
                written[f"{name}.scales"] = packed.scales.half()
        return written

    def _gather(self, x: torch.Tensor, name: str, states: list) -> None:
        """Add a module's activations to the Hessians of all that take them."""

        def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
            with torch.autocast("cpu", enabled=False):
                states[0].add_batch(inputs[0].float(), None)
            raise Stop

        handle = self.modules[name].register_forward_pre_hook(hook)
        for part in x.split(8):
            with contextlib.suppress(Stop):
                self._layer(part)
        handle.remove()
        for state in states[1:]:
            state.H, state.nsamples = states[0].H.clone(), states[0].nsamples


def quantization_config(args: argparse.Namespace) -> dict[str, object]:
    """As the libraries write it."""
    if args.format == "nf4":
        return {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": False}
    return {
        "quant_method": "gptq", "bits": 4, "group_size": args.group, "sym": args.sym, "desc_act": args.desc_act,
        "static_groups": args.static_groups, "damp_percent": args.damp, "checkpoint_format": "gptq",
    }  # fmt: skip


@torch.no_grad()
def main() -> None:
    """Write a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", type=Path, help="a folder as Hugging Face's")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--format", choices=("gptq", "nf4"), default="gptq")
    parser.add_argument("--windows", type=int, default=128, help=f"of {WINDOW} tokens, to calibrate on")
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--desc-act", action="store_true")
    parser.add_argument("--static-groups", action="store_true", help="GPTQ: neighbouring columns even with --desc-act")
    parser.add_argument("--sym", action="store_true")
    parser.add_argument("--mse", action="store_true", help="ranges of groups with the least error, not their whole range")
    parser.add_argument("--damp", type=float, default=0.01, help="of the Hessian's mean diagonal")
    args = parser.parse_args()
    model = LlamaForCausalLM.from_pretrained(args.dense, dtype=torch.float32).eval()
    tokens = calibration(Tokenizer.from_file(str(args.dense / "tokenizer.json")), args.windows)
    x = model.model.embed_tokens(tokens)
    positions = model.model.rotary_emb(x[:1], torch.arange(WINDOW)[None])
    written: dict[str, torch.Tensor] = {}
    for number, module in enumerate(model.model.layers):
        layer = Layer(module, positions)
        prefix = f"model.layers.{number}."
        written |= {prefix + name: tensor.contiguous() for name, tensor in layer.quantize(x, args).items()}
        layer.forward(x)
        print(f"{number + 1} of {len(model.model.layers)} layers", file=sys.stderr, flush=True)
    tied = model.config.tie_word_embeddings
    dense = {name: value for name, value in model.state_dict().items() if "_proj." not in name and not (tied and name == "lm_head.weight")}
    config = json.loads((args.dense / "config.json").read_text())
    config["quantization_config"] = quantization_config(args)
    args.folder.mkdir(parents=True)
    (args.folder / "config.json").write_text(json.dumps(config, indent=1))
    for name in ("generation_config.json", "tokenizer.json"):
        (args.folder / name).write_bytes((args.dense / name).read_bytes())
    save_file(written | {name: value.contiguous() for name, value in dense.items()}, args.folder / "model.safetensors")


if __name__ == "__main__":
    main()
