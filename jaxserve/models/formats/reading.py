"""Reading what a config.json says of quantized matrices, and what the user asks for."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jaxserve.errors import StartupError, UnsupportedModel
from jaxserve.models.fields import Fields
from jaxserve.models.formats.awq import awq_scheme
from jaxserve.models.formats.gptq import gptq_scheme
from jaxserve.models.formats.on_load import SCHEMES
from jaxserve.models.formats.quantization import Quantization, Rule

LINEAR = r"model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"
HEAD = r"lm_head"
# Names of --quantize that take what the checkpoint has, and the methods that each of them takes.
TAKEN = {"awq": ("awq",), "gptq": ("gptq",), "marlin": ("gptq", "awq"), "compressed-tensors": ("compressed-tensors",)}
_SAME = {"fp8": ("fp8",)}


def read_quantization(config: Mapping[str, Any], quantize: str | None) -> Quantization:
    """How the matrices of a model are quantized.

    Args:
        config: config.json.
        quantize: the value of --quantize; None: as the checkpoint has them.

    Raises:
        UnsupportedModel: a method or an option that no code here serves; one line that names it.
        StartupError: --quantize asks for something else than what the checkpoint has.
    """
    declared = config.get("quantization_config") or config.get("compression_config")
    if declared is None:
        if quantize in TAKEN:
            raise StartupError(f"--quantize {quantize}: the checkpoint is not quantized (config.json has no quantization_config)")
        return Quantization() if quantize is None else Quantization(quantize, (SCHEMES[quantize],), (Rule(LINEAR, 0),))
    if not isinstance(declared, Mapping):
        raise UnsupportedModel(f"config.json: quantization_config must be an object. Given: {declared!r:.80}")
    method = declared.get("quant_method")
    if method not in _METHODS:
        known = ", ".join(sorted(_METHODS))
        raise UnsupportedModel(f"config.json: quantization_config: quant_method {method!r:.80} is not supported ({known} are)")
    if quantize is not None and method not in (TAKEN | _SAME).get(quantize, ()):
        raise StartupError(
            f"--quantize {quantize}: the checkpoint is quantized already, by {method}; leave the flag out to serve it as it is"
        )
    return _METHODS[method](Fields(declared, "config.json: quantization_config"))


def exclusions(names: Iterable[str]) -> tuple[Rule, ...]:
    """Rules for modules that a checkpoint lists as dense, by their name, its end, or that of a module they are in."""
    return tuple(Rule(rf"(.*\.)?{re.escape(name)}(\..*)?", -1) for name in names)


def names_of(fields: Fields, name: str) -> list[str]:
    """A list of strings; empty where absent.

    Raises:
        UnsupportedModel: it is something else.
    """
    names = fields.values.get(name) or []
    if not isinstance(names, list) or not all(isinstance(one, str) for one in names):
        raise UnsupportedModel(f"{fields.file}: {name} must be a list of names. Given: {names!r:.80}")
    return names


def _gptq(fields: Fields) -> Quantization:
    scheme = gptq_scheme(fields)
    if fields.values.get("dynamic"):
        raise UnsupportedModel(f"{fields.file}: dynamic (other options for some modules) is not supported")
    pattern = rf"{LINEAR}|{HEAD}" if fields.boolean("lm_head", False) else LINEAR
    inside = fields.values.get("modules_in_block_to_quantize")
    if inside is not None:
        blocks = [name for block in inside for name in (block if isinstance(block, list) else [block])] if isinstance(inside, list) else []
        if not blocks or not all(isinstance(name, str) for name in blocks):
            raise UnsupportedModel(f"{fields.file}: modules_in_block_to_quantize must be lists of names. Given: {inside!r:.80}")
        pattern = rf"model\.layers\.\d+\.({'|'.join(map(re.escape, blocks))})"
    return Quantization("gptq", (scheme,), (*exclusions(names_of(fields, "modules_to_not_convert")), Rule(pattern, 0)))


def _awq(fields: Fields) -> Quantization:
    return Quantization("awq", (awq_scheme(fields),), (*exclusions(names_of(fields, "modules_to_not_convert")), Rule(LINEAR, 0)))


_METHODS: dict[str, Callable[[Fields], Quantization]] = {"awq": _awq, "gptq": _gptq}
