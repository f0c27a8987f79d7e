"""Token ids to text, a few at a time: whatever the cutting, the pieces join to what decoding everything at once gives.

Never a broken character: bytes wait until their character is complete. Never a lost or doubled space: a SentencePiece token's space is
dropped only where the tokenizer's own decoder drops it, at the very start of a text that follows no prompt text.
"""

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"
_LONGEST_CHARACTER = 4
_CONTEXT_TOKENS = 8
_MOST_PENDING_TOKENS = 16


class IncrementalDetokenizer(Protocol):
    """Turns the output tokens of one sample into text."""

    def push(self, token_id: int) -> str:
        """Take the next token; returns the text that is complete with it, often "" in the middle of a character."""
        ...

    def flush(self) -> str:
        """The rest, when no more tokens come: U+FFFD for bytes that never became a character."""
        ...


class ByteLevelDetokenizer:
    """For byte-level BPE, where text is the tokens' bytes one after the other.

    Args:
        table: the bytes of each token id; b"" for a token that is skipped.
        prompt_token_ids: the tokens before the first pushed; a character that the prompt leaves incomplete is completed, or forgotten
            where the output does not go on with it.
    """

    def __init__(self, table: Sequence[bytes], prompt_token_ids: Sequence[int] = ()):
        self._table = table
        known = (table[token_id] for token_id in prompt_token_ids[-_LONGEST_CHARACTER:] if token_id < len(table))
        self._pending = _incomplete(b"".join(known))
        self._prompts = bool(self._pending)  # all that is pending is of the prompt

    def push(self, token_id: int) -> str:
        try:
            data = self._table[token_id]
        except IndexError:
            return ""
        if self._prompts and data:
            self._prompts = False
            if not _continues(data[0]):
                self._pending = b""
        data = self._pending + data
        text, used = codecs.utf_8_decode(data, "replace", False)
        self._pending = data[used:]
        return text

    def flush(self) -> str:
        text, _ = codecs.utf_8_decode(b"" if self._prompts else self._pending, "replace", True)
        self._pending = b""
        return text


def _continues(byte: int) -> bool:
    """Whether it goes on with a character of UTF-8, and begins none."""
    return byte & 0xC0 == 0x80


def _incomplete(data: bytes) -> bytes:
    """The character that the end of the data leaves incomplete, b"" if there is none."""
    for length in range(1, min(len(data), _LONGEST_CHARACTER - 1) + 1):
        if not _continues(data[-length]):
            try:
                _, used = codecs.utf_8_decode(data[-length:], "strict", False)
            except UnicodeDecodeError:
                return b""
            return b"" if used else data[-length:]
    return b""


class SentencePieceDetokenizer:
    """For vocabularies with U+2581 for a space and, where a character has no token, tokens for its bytes.

    A run of byte tokens that is not UTF-8 gives its decodable characters and one U+FFFD for each other byte.

    Args:
        table: the text of each token id, or its byte (int) for a byte token; "" for a token that is skipped.
        strip: spaces that the decoder strips from the start of a text.
        prompt_token_ids: the tokens before the first pushed; if they have any text, no space is stripped, and a character that they
            leave incomplete is completed, or forgotten where the output does not go on with it.
    """

    def __init__(self, table: Sequence[str | int], strip: int, prompt_token_ids: Sequence[int] = ()):
        self._table = table
        self._strip = strip
        tail = b""
        for entry in (table[token_id] for token_id in reversed(prompt_token_ids) if token_id < len(table)):
            if entry == "":
                continue
            self._strip = 0
            if not isinstance(entry, int) or len(tail) == _LONGEST_CHARACTER:
                break
            tail = bytes((entry,)) + tail
        self._pending = _incomplete(tail)
        self._prompts = bool(self._pending)  # all that is pending is of the prompt

    def push(self, token_id: int) -> str:
        try:
            entry = self._table[token_id]
        except IndexError:
            return ""
        if self._prompts and entry != "":
            self._prompts = False
            if not (isinstance(entry, int) and _continues(entry)):
                self._pending = b""
        if isinstance(entry, int):
            self._pending += bytes((entry,))
            text = self._characters()
        elif entry and self._pending:
            text = self._broken() + entry
        else:
            text = entry
        if self._strip and text:
            self._strip, text = 0, _strip_left(text, self._strip)
        return text

    def flush(self) -> str:
        return "" if self._prompts else self._broken()

    def _characters(self) -> str:
        text = ""
        while self._pending:
            try:
                decoded, used = codecs.utf_8_decode(self._pending, "strict", False)
            except UnicodeDecodeError as error:
                decoded = self._pending[: error.start].decode() + REPLACEMENT * (error.end - error.start)
                used = error.end
            if not used:
                break
            text += decoded
            self._pending = self._pending[used:]
        return text

    def _broken(self) -> str:
        text = REPLACEMENT * len(self._pending)
        self._pending = b""
        return text


def _strip_left(text: str, most: int) -> str:
    spaces = len(text) - len(text.lstrip(" "))
    return text[min(spaces, most) :]


class WindowDetokenizer:
    """For any other tokenizer: decodes a window of tokens with and without the new ones and takes the difference.

    Args:
        decode: token ids to text.
        prompt_token_ids: the tokens before the first pushed.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt_token_ids: Sequence[int] = ()):
        self._decode = decode
        self._tokens = list(prompt_token_ids[-_CONTEXT_TOKENS:])
        self._told = len(self._tokens)

    def push(self, token_id: int) -> str:
        self._tokens.append(token_id)
        return self._advance(final=len(self._tokens) - self._told >= _MOST_PENDING_TOKENS)

    def flush(self) -> str:
        return self._advance(final=True) if self._told < len(self._tokens) else ""

    def _advance(self, final: bool) -> str:
        """The new text, unless its end may still change."""
        text = self._decode(self._tokens)
        if text.endswith(REPLACEMENT) and not final:
            return ""
        before = self._decode(self._tokens[: self._told])
        del self._tokens[: max(len(self._tokens) - _CONTEXT_TOKENS, 0)]
        self._told = len(self._tokens)
        return text[len(before) :]
