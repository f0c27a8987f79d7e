"""Quantization: which matrices of a model are quantized, and how."""

import re
from dataclasses import dataclass

from jaxserve.models.formats.scheme import Scheme


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
        """Of the matrix of a module, by its name in the checkpoint; None: it is dense."""
        for rule in self.rules:
            if re.fullmatch(rule.pattern, module):
                return None if rule.scheme < 0 else self.schemes[rule.scheme]
        return None

    def __bool__(self) -> bool:
        return bool(self.method)
