"""TokenBound: fewer tokens than this a text cannot have, told without tokenizing it.

Give each byte value b the weight 1 / (length of the longest token with b in it). No token weighs more than 1 then, so a text has at
least as many tokens as its bytes weigh together. It holds only where tokens cover the text and none of it is dropped or merged before,
so that tokenizers with a step not known here have no bound.
"""

import json
import math

import numpy as np
import tokenizers

from jaxserve.tokenizer.vocabulary import SPACE, ByteLevelVocabulary, SentencePieceVocabulary

_WHITE = tuple(b"\t\n\v\f\r\x1c\x1d\x1e\x1f ")
_KEEPING_SPLITS = ("Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous")


class TokenBound:
    """A lower bound on the number of tokens of any text.

    Args:
        weights: of each byte value, float64 [256].
        composes: Unicode composition runs before tokenizing: only ASCII that no mark can follow is sure to stay.
        space: the stand-in for a space, which means one in a text too; "" where there is none.
    """

    def __init__(self, weights: np.ndarray, composes: bool, space: str):
        self._weights = weights
        self._composes = composes
        self._space = space

    def least_tokens(self, text: str) -> int:
        """A number of tokens that the text has at least; 2 ms for a megabyte."""
        if self._space:
            text = text.replace(self._space, " ")
        data = np.frombuffer(text.encode(), np.uint8)
        if self._composes and not text.isascii():
            plain = data < 128
            plain[:-1] &= plain[1:]
            data = data[plain]
        return math.ceil(np.bincount(data, minlength=256) @ self._weights - 1e-6)


def token_bound(backend: tokenizers.Tokenizer, vocabulary: ByteLevelVocabulary | SentencePieceVocabulary) -> TokenBound | None:
    """The bound of a tokenizer; None where nothing is sure."""
    state = json.loads(backend.to_str())
    normalizers, splits = _steps(state["normalizer"], "normalizers"), _steps(state["pre_tokenizer"], "pretokenizers")
    if not all(_normalizer_keeps(step) for step in normalizers) or not all(_split_keeps(step) for step in splits):
        return None
    byte_level = isinstance(vocabulary, ByteLevelVocabulary)
    if state["model"]["type"] != "BPE" or not (byte_level or state["model"].get("byte_fallback")):
        return None
    tokens = [vocabulary.token_bytes(token_id) for token_id in range(len(vocabulary.table))]
    tokens += [token["content"].encode() for token in state["added_tokens"]]  # found in the text as they are written
    longest = np.zeros(256)
    lengths = np.array([len(token) for token in tokens])
    np.maximum.at(longest, np.frombuffer(b"".join(tokens), np.uint8), np.repeat(lengths, lengths))
    if not byte_level:
        if not set(range(256)) <= {entry for entry in vocabulary.table if isinstance(entry, int)}:
            return None
    else:
        spelled = {token[0] for token in tokens if len(token) == 1}
        longest[[byte for byte in range(256) if byte not in spelled]] = np.inf  # it would be dropped
    if any(token["lstrip"] or token["rstrip"] for token in state["added_tokens"]):
        longest[list(_WHITE)] = np.inf  # swallowed beside such a token, however long
    return TokenBound(1 / longest, any(step["type"] == "NFC" for step in normalizers), "" if byte_level else SPACE)


def _steps(step: dict | None, inner: str) -> list[dict]:
    if step is None:
        return []
    return step[inner] if step["type"] == "Sequence" else [step]


def _normalizer_keeps(step: dict) -> bool:
    if step["type"] == "Replace":
        return step["pattern"] == {"String": " "} and step["content"] == SPACE
    return step["type"] in ("NFC", "Prepend")


def _split_keeps(step: dict) -> bool:
    if step["type"] in ("Split", "Punctuation"):
        return step["behavior"] in _KEEPING_SPLITS
    return step["type"] in ("ByteLevel", "Digits", "Metaspace")
