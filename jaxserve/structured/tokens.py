"""The vocabulary as grammars see it: the bytes of every token, in a trie."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxserve.errors import StartupError
from jaxserve.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLTokenizer


def read_tokens(tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> "LLTokenizer":
    """Build llguidance's tokenizer.

    Args:
        tokenizer: the model's.
        vocab_size: of the model; ids that the tokenizer lacks are never allowed.
        eos_token_ids: end-of-sequence tokens of the model, allowed where a grammar's text is complete.

    Raises:
        StartupError: the tokenizer's tokens are not strings of bytes (WordPiece), or nobody can tell.
    """
    from llguidance import LLTokenizer  # here, so that only a process that compiles grammars loads it

    pipeline = tokenizer.as_json()
    if pipeline is None:
        raise StartupError("the model's tokenizer is not one of the library `tokenizers`")
    # A model without an end-of-sequence token still has the tokenizer's: it stands for the end of the grammar and is never sampled.
    ends = list(eos_token_ids) or [tokenizer.eos_token_id or 0]
    try:
        return LLTokenizer(pipeline, n_vocab=max(vocab_size, tokenizer.vocab_size), eos_token=ends)
    except ValueError as error:
        raise StartupError(f"the model's tokenizer cannot be read as tokens of bytes: {error}") from error
