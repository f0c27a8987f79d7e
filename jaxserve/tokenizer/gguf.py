"""A tokenizer from the metadata of a .gguf file.

The keys are described in github.com/ggml-org/ggml, docs/gguf.md; what the names under `tokenizer.ggml.pre` mean is only in llama.cpp's
source (src/llama-vocab.cpp).
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from jaxserve.errors import StartupError, UnsupportedModel
from jaxserve.gguf_header import read_gguf_header
from jaxserve.tokenizer.vocabulary import SPACE

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_QWEN2 = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)

# Regular expressions that cut a text, one after the other, before its pieces are merged.
_SPLITS: dict[str, Sequence[str]] = {
    **dict.fromkeys(("default", "gpt-2", "mpt", "olmo", "jais", "phi-2", "trillion"), (_GPT2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), (r"\p{N}", _GPT2)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "smaug-bpe", "dbrx"), (_LLAMA3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), (_QWEN2,)),
    "tekken": (_TEKKEN,),
}
# A piece that is a token is taken whole, whatever the merges say; these also begin a text with BOS unless the file says otherwise.
_WHOLE_PIECES = frozenset({"llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "tekken"})
# Qwen's own tokenizer composes accents first.
_COMPOSED = frozenset({"qwen2", "deepseek-r1-qwen"})


def load_gguf_tokenizer(path: Path) -> Any:
    """transformers' fast tokenizer, with its chat template, from a file's metadata.

    Raises:
        StartupError: no GGUF file, or one without a tokenizer.
        UnsupportedModel: a kind of tokenizer that no code here builds.
    """
    metadata = read_gguf_header(path).metadata
    with _told(path):
        backend = build_gguf_tokenizer(metadata)
        names = {
            name: metadata["tokenizer.ggml.tokens"][_index(metadata[key])]
            for name, key in {
                "bos_token": "tokenizer.ggml.bos_token_id",
                "eos_token": "tokenizer.ggml.eos_token_id",
                "unk_token": "tokenizer.ggml.unknown_token_id",
                "pad_token": "tokenizer.ggml.padding_token_id",
            }.items()
            if key in metadata
        }
        template = _chat_template(metadata)
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, clean_up_tokenization_spaces=False, **names)


def load_gguf_pipeline(path: Path) -> Tokenizer:
    """The `tokenizers` pipeline of a file. Raises as load_gguf_tokenizer."""
    metadata = read_gguf_header(path).metadata
    with _told(path):
        return build_gguf_tokenizer(metadata)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Say in one line what is wrong with the file's tokenizer, whatever its values, of whatever type, make this code raise."""
    try:
        yield
    except UnsupportedModel:
        raise
    except Exception as error:
        told = " ".join(str(error).split())[:200] or type(error).__name__
        if isinstance(error, KeyError) and str(error.args[0]).startswith("tokenizer."):
            told = f"its metadata lacks {error.args[0]}"
        raise StartupError(f"{path} has no usable tokenizer: {told}") from error


def _index(token_id: Any) -> int:
    """A token's place in the list of all.

    Raises:
        IndexError: it is none.
    """
    if isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0:
        raise IndexError(f"{token_id!r:.80} is no token id")
    return token_id


def build_gguf_tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    """The `tokenizers` pipeline that a file's metadata describes.

    Raises:
        KeyError: a key is missing; other exceptions where values are of the wrong kind.
        UnsupportedModel: `tokenizer.ggml.model` or `.pre` names one that no code here builds.
    """
    model = metadata["tokenizer.ggml.model"]
    if model == "gpt2":
        backend, add_bos = _byte_level(metadata)
    elif model == "llama":
        backend, add_bos = _sentencepiece(metadata)
    else:
        raise UnsupportedModel(
            f"the file's tokenizer is of kind {model!r}; supported: 'gpt2' (byte-level BPE), 'llama' (SentencePiece BPE)"
        )
    tokens = metadata["tokenizer.ggml.tokens"]
    kinds = metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
    special = [AddedToken(t, normalized=False, special=True) for t, k in zip(tokens, kinds, strict=True) if k in (_CONTROL, _UNKNOWN)]
    plain = [AddedToken(t, normalized=False, special=False) for t, k in zip(tokens, kinds, strict=True) if k == _USER_DEFINED]
    backend.add_special_tokens(special)
    backend.add_tokens(plain)
    added = {
        name: (tokens[_index(metadata[f"tokenizer.ggml.{name}_token_id"])], metadata[f"tokenizer.ggml.{name}_token_id"])
        for name, default in (("bos", add_bos), ("eos", False))
        if metadata.get(f"tokenizer.ggml.add_{name}_token", default)
    }
    single = [added["bos"][0]] if "bos" in added else []
    single += ["$A", added["eos"][0]] if "eos" in added else ["$A"]
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=list(added.values()))
    return backend


def _byte_level(metadata: dict[str, Any]) -> tuple[Tokenizer, bool]:
    """Byte-level BPE, and whether a text begins with BOS by default."""
    name = metadata.get("tokenizer.ggml.pre", "default")
    if name not in _SPLITS:
        raise UnsupportedModel(f"the file's tokenizer splits text in the way {name!r}; supported: {', '.join(sorted(_SPLITS))}")
    vocabulary = {token: token_id for token_id, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    # A space within a token is spelled differently, so the only one parts the two halves.
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=name in _WHOLE_PIECES))
    if name in _COMPOSED:
        backend.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _SPLITS[name]]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    return backend, name in _WHOLE_PIECES


def _sentencepiece(metadata: dict[str, Any]) -> tuple[Tokenizer, bool]:
    """SentencePiece's BPE with byte fallback: scores stand in for merges."""
    from transformers.tokenization_utils_base import generate_merges

    tokens = metadata["tokenizer.ggml.tokens"]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    merges = generate_merges(vocabulary, dict(zip(tokens, metadata["tokenizer.ggml.scores"], strict=True)))
    unknown = tokens[metadata.get("tokenizer.ggml.unknown_token_id", 0)]
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="first" if prefix else "never", split=False)
    strip = [decoders.Strip(content=" ", left=1)] if prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return backend, True


def _chat_template(metadata: dict[str, Any]) -> str | dict[str, str] | None:
    """The file's template, or all of them by name if there are several."""
    default = metadata.get("tokenizer.chat_template")
    if not isinstance(default, str | None):
        raise TypeError(f"tokenizer.chat_template is {default!r:.80}")
    named = {name: metadata[f"tokenizer.chat_template.{name}"] for name in metadata.get("tokenizer.chat_templates", ())}
    if not named:
        return default
    return named if default is None else {**named, "default": default}
