"""The vocabulary as grammars see it: the bytes of every token, in a trie."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import tokenizers

from jaxserve.errors import StartupError

if TYPE_CHECKING:
    from llguidance import LLTokenizer


def read_tokens(pipeline: tokenizers.Tokenizer | None, vocab_size: int, eos_token_ids: Sequence[int]) -> "LLTokenizer":
    """Build llguidance's tokenizer.

    Args:
        pipeline: of the model's tokenizer; None where it has none.
        vocab_size: of the model; ids that the tokenizer lacks are never allowed.
        eos_token_ids: end-of-sequence tokens of the model, allowed where a grammar's text is complete.

    Raises:
        StartupError: the tokens are not strings of bytes (WordPiece), or nobody can tell.
    """
    from llguidance import LLTokenizer  # here, so that only a process that compiles grammars loads it

    if pipeline is None:
        raise StartupError("the model's tokenizer is not one of the library `tokenizers`")
    size = pipeline.get_vocab_size(with_added_tokens=True)
    # For a model without an end-of-sequence token some token must stand for the end, best one that no text has; it is never sampled.
    special = sorted(token_id for token_id, token in pipeline.get_added_tokens_decoder().items() if token.special)
    ends = [token_id for token_id in eos_token_ids if token_id < size] or special[:1] or [0]
    try:
        return LLTokenizer(pipeline.to_str(), n_vocab=max(vocab_size, size), eos_token=ends)
    except ValueError as error:
        raise StartupError(f"the model's tokenizer cannot be read as tokens of bytes: {error}") from error
