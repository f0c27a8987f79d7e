"""Text to token ids and back: the model's tokenizer and chat template, incremental detokenization, stop strings."""

from jaxserve.tokenizer.detokenizer import IncrementalDetokenizer
from jaxserve.tokenizer.loading import import_transformers, load_pipeline, load_tokenizer
from jaxserve.tokenizer.stop import StopMatcher
from jaxserve.tokenizer.text_stream import TextDelta, TextStream
from jaxserve.tokenizer.tokenizer import Tokenizer, TokenSpan

__all__ = [
    "IncrementalDetokenizer",
    "StopMatcher",
    "TextDelta",
    "TextStream",
    "TokenSpan",
    "Tokenizer",
    "import_transformers",
    "load_pipeline",
    "load_tokenizer",
]
