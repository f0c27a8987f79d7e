"""Reading what a config.json says of quantized matrices, and what the user asks for."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from jaxserve.errors import StartupError, UnsupportedModel
from jaxserve.models.fields import Fields
from jaxserve.models.formats.awq import awq_scheme
from jaxserve.models.formats.bitsandbytes import bitsandbytes_scheme
from jaxserve.models.formats.compressed_tensors import read_compressed_tensors
from jaxserve.models.formats.fp8 import fp8_scheme, stored_fp8
from jaxserve.models.formats.gguf import GGUFTypes, gguf_scheme
from jaxserve.models.formats.gptq import gptq_scheme
from jaxserve.models.formats.mxfp4 import mxfp4_scheme
from jaxserve.models.formats.on_load import SCHEMES
from jaxserve.models.formats.quantization import HEAD, LINEAR, Quantization, Rule, exclusions, names_of
from jaxserve.models.formats.scheme import Scheme

# Names of --quantize that take what the checkpoint has, and the methods that each of them takes.
TAKEN = {"awq": ("awq",), "gptq": ("gptq", "awq"), "marlin": ("gptq", "awq"), "compressed-tensors": ("compressed-tensors",)}
# Those of the others that a checkpoint may have already.
_SAME = {
    "fp8": ("fp8", "fbgemm_fp8", "modelopt"),
    "bitsandbytes": ("bitsandbytes int8",),
    "bitsandbytes-nf4": ("bitsandbytes nf4",),
    "bitsandbytes-fp4": ("bitsandbytes fp4",),
}


def read_quantization(config: Mapping[str, Any], quantize: str | None) -> Quantization:
    """How the matrices of a model are quantized.

    Args:
        config: config.json.
        quantize: the value of --quantize; None: as the checkpoint has them.

    Raises:
        UnsupportedModel: a method or an option that no code here serves; one line that names it.
        StartupError: --quantize asks for something else than what the checkpoint has.
    """
    quantization = _declared(config.get("quantization_config") or config.get("compression_config"))
    if not quantization:
        if quantize in TAKEN:
            raise StartupError(
                f"--quantize {quantize}: the checkpoint is not quantized (config.json has no quantization_config of weights)"
            )
        return Quantization() if quantize is None else Quantization(quantize, (SCHEMES[quantize],), (Rule(LINEAR, 0),))
    if quantize is not None and quantization.method not in (TAKEN | _SAME).get(quantize, ()):
        told = quantization.method
        raise StartupError(f"--quantize {quantize}: the checkpoint is quantized already, by {told}; without the flag it is served so")
    return quantization


def _declared(declared: Any) -> Quantization:
    """What a quantization_config, or a .gguf file in its place, says of the weights."""
    if declared is None:
        return Quantization()
    if isinstance(declared, GGUFTypes):
        return _gguf(declared.types)
    if not isinstance(declared, Mapping):
        raise UnsupportedModel(f"config.json: quantization_config must be an object. Given: {declared!r:.80}")
    method = declared.get("quant_method")
    # Before there were several methods, configurations did not name theirs.
    if method is None and any(declared.get(name) is True for name in ("load_in_4bit", "load_in_8bit")):
        method = "bitsandbytes"
    if method == "gguf":
        raise UnsupportedModel("config.json: quantization_config: quant_method 'gguf' goes with a .gguf file, which --model-id must name")
    if not isinstance(method, str) or method not in _METHODS:
        known = ", ".join(sorted(_METHODS))
        raise UnsupportedModel(f"config.json: quantization_config: quant_method {method!r:.80} is not supported ({known} are)")
    return _METHODS[method](Fields(declared, "config.json: quantization_config"))


def _gptq(fields: Fields) -> Quantization:
    scheme = gptq_scheme(fields)
    pattern = rf"{LINEAR}|{HEAD}" if fields.boolean("lm_head", False) else LINEAR
    inside = fields.values.get("modules_in_block_to_quantize")
    if inside is not None:
        blocks = [name for block in inside for name in (block if isinstance(block, list) else [block])] if isinstance(inside, list) else []
        if not blocks or not all(isinstance(name, str) for name in blocks):
            raise UnsupportedModel(f"{fields.file}: modules_in_block_to_quantize must be lists of names. Given: {inside!r:.80}")
        pattern = rf"model\.layers\.\d+\.({'|'.join(map(re.escape, blocks))})"
    return Quantization("gptq", (scheme,), (*exclusions(names_of(fields, "modules_to_not_convert")), Rule(pattern, 0)))


def _awq(fields: Fields) -> Quantization:
    """AutoAWQ takes a name in its list for any part of modules' names; but layers.1 is not part of layers.11 here."""
    names = [name for name in names_of(fields, "modules_to_not_convert") if name]
    ends = (r"(?!\d)" if name[-1].isdigit() else "" for name in names)
    dense = (Rule(f".*{re.escape(name)}{end}.*", -1) for name, end in zip(names, ends, strict=True))
    return Quantization("awq", (awq_scheme(fields),), (*dense, Rule(LINEAR, 0)))


def _fp8(fields: Fields) -> Quantization:
    return _but(fields, "fp8", fp8_scheme(fields), "modules_to_not_convert", "ignored_layers")


def _fbgemm_fp8(fields: Fields) -> Quantization:
    return _but(fields, "fbgemm_fp8", stored_fp8("channel", static=False), "modules_to_not_convert")


def _modelopt(fields: Fields) -> Quantization:
    """NVIDIA's ModelOpt; what its hf_quant_config.json says is one level deeper. In its lists * stands for anything."""
    inner = fields.values.get("quantization")
    fields = Fields(inner, f"{fields.file}: quantization") if isinstance(inner, Mapping) else fields
    if (algorithm := fields.values.get("quant_algo")) != "FP8":
        raise UnsupportedModel(f"{fields.file}: quant_algo {algorithm!r:.80} is not supported (FP8 is)")
    names = [*names_of(fields, "exclude_modules"), *names_of(fields, "ignore")]
    return Quantization("modelopt", (stored_fp8("tensor", static=True),), (*exclusions(names, wildcard="*"), Rule(LINEAR, 0)))


def _bitsandbytes(fields: Fields) -> Quantization:
    scheme = bitsandbytes_scheme(fields)
    kind = "int8" if scheme.layout.code == "int8" else scheme.layout.code
    return _but(fields, f"bitsandbytes {kind}", scheme, "llm_int8_skip_modules")


def _mxfp4(fields: Fields) -> Quantization:
    return _but(fields, "mxfp4", mxfp4_scheme("blocks"), "modules_to_not_convert")


def _gguf(types: Mapping[str, str]) -> Quantization:
    """By the type of each matrix that stays quantized."""
    kinds = sorted(set(types.values()))
    rules = (Rule("|".join(re.escape(module) for module, kind in types.items() if kind == wanted), i) for i, wanted in enumerate(kinds))
    return Quantization("gguf", tuple(map(gguf_scheme, kinds)), tuple(rules))


def _but(fields: Fields, method: str, scheme: Scheme, *lists: str) -> Quantization:
    """All linear modules of the layers, but those in lists of the configuration. These methods leave the head dense."""
    names = [name for field in lists for name in names_of(fields, field)]
    return Quantization(method, (scheme,), (*exclusions(names), Rule(LINEAR, 0)))


_METHODS: dict[str, Callable[[Fields], Quantization]] = {
    "awq": _awq,
    "bitsandbytes": _bitsandbytes,
    "compressed-tensors": read_compressed_tensors,
    "fbgemm_fp8": _fbgemm_fp8,
    "fp8": _fp8,
    "gptq": _gptq,
    "modelopt": _modelopt,
    "mxfp4": _mxfp4,
}
