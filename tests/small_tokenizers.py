"""Small real tokenizers, trained in milliseconds: byte-level BPE, SentencePiece BPE with byte fallback, and others."""

import functools
import random
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "The quick brown fox jumps over the lazy dog. It's 1234 o'clock; don't worry!",
    "def f(x):\n    return x ** 2  # a comment\n\n\nclass A:\n\tpass\n",
    "Übergröße naïve café — “quotes” … 日本語のテキスト、中文文本。 Привет, мир!",
    "user: hello there\nassistant: hi, how can I help you today?\n" * 3,
]
TEXTS = [
    "Hello world 12345 x1 1 22\n\n\n  def f(x):\n\treturn x**2  ",
    "naïve 日本語 😀👨‍👩‍👧 ٣٤٥ ²³ ½",
    "it's  DON'T \r\n \n x",
    "  two leading, two trailing  ",
    "e\u0301 مرحبا \u00a0nbsp \ufffd replacement",
    "🇩🇪🏳️‍🌈 the end",
]
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def random_texts(count: int, seed: int) -> list[str]:
    """Texts of letters, spaces, digits, accents, CJK, emoji and a literal U+FFFD in any order."""
    rng = random.Random(seed)
    alphabet = "ab the  \n\t019é日本😀👍🏽.,'!\ufffdÀß"
    return ["".join(rng.choice(alphabet) for _ in range(rng.randrange(1, 40))) for _ in range(count)]


@functools.cache
def byte_level() -> Tokenizer:
    """GPT-2's kind, as in Llama 3, Qwen and SmolLM2."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special: list[Any] = [AddedToken(t, special=True, normalized=False) for t in SPECIAL]
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return backend


@functools.cache
def sentencepiece(add_bos: bool = True) -> Tokenizer:
    """Llama 2's kind: U+2581 for spaces, one before the text, bytes where a character has no token."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator([line.replace("日", "") for line in CORPUS], trainers.BpeTrainer(vocab_size=300, show_progress=False))
    merges = [part for part in _merges(trained) if set("".join(part)) <= set("▁abcdefghijklmnopqrstuvwxyzTheI:.,!")]
    pieces = [
        *SPECIAL,
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *"▁abcdefghijklmnopqrstuvwxyzThIü日:.,!",
        *("".join(part) for part in merges),
    ]
    vocabulary = {piece: token_id for token_id, piece in enumerate(dict.fromkeys(pieces))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    if add_bos:
        backend.post_processor = processors.TemplateProcessing(single=["<s>", "$A"], special_tokens=[("<s>", 1)])
    return backend


@functools.cache
def gemma_like() -> Tokenizer:
    """SentencePiece without a space before the text."""
    backend = Tokenizer.from_str(sentencepiece().to_str())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never", split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


@functools.cache
def word_pieces() -> Tokenizer:
    """A kind without a table: decoded through a window of tokens."""
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(cleanup=False)
    backend.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False))
    return backend


def _merges(backend: Tokenizer) -> list[tuple[str, str]]:
    import json

    return [tuple(merge) for merge in json.loads(backend.to_str())["model"]["merges"]]


def fast(backend: Tokenizer, **options: Any) -> Any:
    """transformers' wrapper."""
    from transformers import PreTrainedTokenizerFast

    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **names, **options)
