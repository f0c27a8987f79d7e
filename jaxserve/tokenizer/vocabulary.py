"""What each token id stands for, read once from a fast tokenizer's vocabulary and decoder."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import tokenizers

from jaxserve.tokenizer.detokenizer import ByteLevelDetokenizer, IncrementalDetokenizer, SentencePieceDetokenizer

SPACE = "\u2581"


@dataclass(frozen=True)
class ByteLevelVocabulary:
    """Byte-level BPE (GPT-2, Llama 3, Qwen): every token is a string of bytes.

    Attributes:
        table: bytes of each id.
        table_without_special: the same with b"" for special tokens.
    """

    table: Sequence[bytes]
    table_without_special: Sequence[bytes]

    def token_bytes(self, token_id: int) -> bytes:
        return self.table[token_id] if token_id < len(self.table) else b""

    def detokenizer(self, prompt_token_ids: Sequence[int], skip_special_tokens: bool) -> IncrementalDetokenizer:
        return ByteLevelDetokenizer(self.table_without_special if skip_special_tokens else self.table, prompt_token_ids)


@dataclass(frozen=True)
class SentencePieceVocabulary:
    """Llama 1 and 2, Mistral, Gemma: text with U+2581 for a space, and byte tokens.

    Attributes:
        table: text of each id, or the byte of a byte token.
        table_without_special: the same with "" for special tokens.
        strip: leading spaces that decoding drops.
    """

    table: Sequence[str | int]
    table_without_special: Sequence[str | int]
    strip: int

    def token_bytes(self, token_id: int) -> bytes:
        entry = self.table[token_id] if token_id < len(self.table) else ""
        return bytes((entry,)) if isinstance(entry, int) else entry.encode()

    def detokenizer(self, prompt_token_ids: Sequence[int], skip_special_tokens: bool) -> IncrementalDetokenizer:
        return SentencePieceDetokenizer(self.table_without_special if skip_special_tokens else self.table, self.strip, prompt_token_ids)


def read_vocabulary(backend: tokenizers.Tokenizer) -> ByteLevelVocabulary | SentencePieceVocabulary | None:
    """Tables for the decoders that language models use; None for any other."""
    if backend.decoder is None:
        return None
    decoder = json.loads(backend.decoder.__getstate__())
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = [step["type"] for step in steps]
    vocabulary = backend.get_vocab(with_added_tokens=True)
    tokens = [""] * (max(vocabulary.values(), default=-1) + 1)
    for token, token_id in vocabulary.items():
        tokens[token_id] = token
    special = {token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special}
    if kinds == ["ByteLevel"]:
        byte_of = {character: byte for byte, character in enumerate(byte_alphabet())}
        table = [_spelled_bytes(token, byte_of) for token in tokens]
        return ByteLevelVocabulary(table, [b"" if i in special else data for i, data in enumerate(table)])
    if kinds in (["Replace", "ByteFallback", "Fuse"], ["Replace", "ByteFallback", "Fuse", "Strip"]):
        replace, strip = steps[0], steps[3] if len(steps) == 4 else {"content": " ", "start": 0, "stop": 0}
        if replace["pattern"] != {"String": SPACE} or replace["content"] != " " or strip["content"] != " " or strip["stop"]:
            return None
        texts = [_text_or_byte(token) for token in tokens]
        return SentencePieceVocabulary(texts, ["" if i in special else text for i, text in enumerate(texts)], strip["start"])
    return None


def byte_alphabet() -> list[str]:
    """GPT-2's printable stand-in for each byte: itself where it is printable Latin-1, else the next character from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    stand_ins = (chr(code) for code in range(256, 512))
    return [chr(byte) if byte in printable else next(stand_ins) for byte in range(256)]


def _spelled_bytes(token: str, byte_of: dict[str, int]) -> bytes:
    try:
        return bytes([byte_of[character] for character in token])
    except KeyError:  # an added token, written as plain text
        return token.encode()


def _text_or_byte(token: str) -> str | int:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return int(token[3:5], 16)
        except ValueError:
            return token
    return token.replace(SPACE, " ")
