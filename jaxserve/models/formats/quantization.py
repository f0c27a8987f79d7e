"""Quantization: which matrices of a model are quantized, and how."""

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

import regex

from jaxserve.errors import UnsupportedModel
from jaxserve.models.fields import Fields
from jaxserve.models.formats.scheme import Scheme
from jaxserve.pallas_kernels import ScaleDtype

LINEAR = r"model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"
HEAD = r"lm_head"
# Storages that have scales in whichever dtype the checkpoint was made with.
_SCALED = ("awq", "fp8", "gptq", "int8", "packed")
_MATCH_SECONDS = 1.0  # a checkpoint's own regular expression may take for one name


@dataclass(frozen=True)
class Rule:
    """Which modules have a scheme.

    Attributes:
        pattern: a regular expression that a module's whole name matches.
        scheme: index in `Quantization.schemes`; -1: the modules are dense.
    """

    pattern: str
    scheme: int


@dataclass(frozen=True)
class Quantization:
    """How a model's matrices are quantized; without a method they are not.

    Attributes:
        method: as users call it: "gptq", "fp8".
        schemes: those that occur.
        rules: the first that matches a module decides; modules that none matches are dense.
    """

    method: str = ""
    schemes: tuple[Scheme, ...] = ()
    rules: tuple[Rule, ...] = ()

    def scheme(self, module: str) -> Scheme | None:
        """Of the matrix of a module, by its name in the checkpoint; None: it is dense.

        Raises:
            UnsupportedModel: a regular expression of the checkpoint does not come to an end.
        """
        for rule in self.rules:
            try:
                matches = compiled(rule.pattern).fullmatch(module, timeout=_MATCH_SECONDS)
            except TimeoutError:
                raise UnsupportedModel(f"config.json: quantization_config: {rule.pattern!r:.80} takes too long to match {module}") from None
            if matches:
                return None if rule.scheme < 0 else self.schemes[rule.scheme]
        return None

    def with_scales(self, dtype: ScaleDtype) -> "Quantization":
        """The same, where the checkpoint's scales are of this dtype; those that were not read from it stay as they are."""
        kept = tuple(_with_scales(scheme, dtype) if scheme.stored in _SCALED else scheme for scheme in self.schemes)
        return replace(self, schemes=kept)

    @property
    def description(self) -> str:
        """For people: the method, and what it does not say of itself: "fp8", "gptq (int4)", "gguf (Q4_1, Q8_0)"; "" without one."""
        kinds = sorted({scheme.variant if scheme.stored == "gguf" else scheme.layout.code for scheme in self.schemes})
        told = [kind for kind in kinds if kind not in self.method]
        return f"{self.method} ({', '.join(told)})" if told else self.method

    def __bool__(self) -> bool:
        return bool(self.method)


@functools.cache  # that of `regex` forgets patterns where a list has many
def compiled(pattern: str) -> "regex.Pattern[str]":
    """Of a rule; checkpoints bring their own, so it must be possible to give up matching, which `re` does not offer."""
    return regex.compile(pattern)


def _with_scales(scheme: Scheme, dtype: ScaleDtype) -> Scheme:
    return replace(scheme, layout=replace(scheme.layout, scale_dtype=dtype))


def exclusions(names: Iterable[str], wildcard: str = "") -> tuple[Rule, ...]:
    """Rules for modules that a checkpoint lists as dense, by their name, its end, or that of a module they are in.

    Args:
        wildcard: what stands for anything in the names, if something does.
    """
    patterns = (".*".join(map(re.escape, name.split(wildcard) if wildcard else [name])) for name in names)
    return tuple(Rule(rf"(.*\.)?{pattern}(\..*)?", -1) for pattern in patterns)


def names_of(fields: Fields, name: str) -> list[str]:
    """A list of strings; empty where absent.

    Raises:
        UnsupportedModel: it is something else.
    """
    names = fields.values.get(name) or []
    if not isinstance(names, list) or not all(isinstance(one, str) for one in names):
        raise UnsupportedModel(f"{fields.file}: {name} must be a list of names. Given: {names!r:.80}")
    return names
