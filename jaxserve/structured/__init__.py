"""Structured output: a grammar becomes a matcher of tokens, and a matcher the mask of the tokens that may come next (llguidance)."""

from jaxserve.structured.compiler import Compilation, GrammarCompiler
from jaxserve.structured.masks import MaskFiller, Matcher
from jaxserve.structured.tokens import read_tokens

__all__ = ["Compilation", "GrammarCompiler", "MaskFiller", "Matcher", "read_tokens"]
