"""Tokenizers from folders and from GGUF metadata, against transformers, llama.cpp and the tokenizers that they were made from."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import gguf
import pytest
import small_tokenizers
from small_tokenizers import SPECIAL, TEXTS, random_texts
from tokenizers import Tokenizer as Backend
from tokenizers.normalizers import NFC, Strip

from jaxserve.errors import ContextTooLong, InvalidRequest, ModelNotFound, StartupError, UnsupportedModel
from jaxserve.tokenizer import Tokenizer, load_tokenizer
from jaxserve.tokenizer.gguf import _SPLITS

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
ALL_TEXTS = [*TEXTS, *random_texts(100, seed=5), "<|im_start|>user\nhi<|im_end|>", "a<think>b", ""]


def write_gguf(path: Path, model: str, backend: Backend, /, **fields: Any) -> Path:
    """A .gguf file without tensors; fields replace or add to `tokenizer.ggml.*` (None leaves one out)."""
    vocabulary = backend.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    added = {token.content: 3 if token.special else 4 for token in backend.get_added_tokens_decoder().values()}
    values: dict[str, Any] = {
        "model": model,
        "tokens": tokens,
        "token_type": [2 if t == "<unk>" else 6 if model == "llama" and t.startswith("<0x") else added.get(t, 1) for t in tokens],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    merges = [tuple(merge) for merge in json.loads(backend.to_str())["model"]["merges"]]
    if model == "gpt2":
        values |= {"pre": "gpt-2", "merges": [" ".join(merge) for merge in merges]}
    else:
        ranks = {"".join(merge): float(-rank) for rank, merge in enumerate(merges)}
        values["scores"] = [ranks.get(token, -1e6) for token in tokens]
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in (values | fields).items():
        key = f"tokenizer.ggml.{name}"
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif value is not None:
            writer.add_string(key, value)
    writer.add_chat_template(TEMPLATE)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    small_tokenizers.fast(small_tokenizers.byte_level(), chat_template=TEMPLATE).save_pretrained(path)
    return path


def test_a_folder_gives_the_tokens_of_transformers(folder: Path):
    tokenizer, theirs = load_tokenizer(folder), small_tokenizers.fast(small_tokenizers.byte_level())
    for text in ALL_TEXTS:
        assert tokenizer.encode(text) == theirs(text).input_ids
        assert tokenizer.encode(text, add_special_tokens=False) == theirs(text, add_special_tokens=False).input_ids
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.vocab_size) == (1, 2, len(theirs))
    assert tokenizer.has_chat_template


def test_a_saved_limit_or_padding_is_ignored(tmp_path: Path):
    backend = Backend.from_str(small_tokenizers.byte_level().to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=16)
    assert len(Tokenizer(small_tokenizers.fast(backend)).encode("the quick brown fox " * 3)) > 16


@pytest.mark.parametrize("add_bos", [True, False])
def test_bos_is_added_where_the_tokenizer_says_so(add_bos: bool):
    tokenizer = Tokenizer(small_tokenizers.fast(small_tokenizers.sentencepiece(add_bos)))
    assert (tokenizer.encode("the")[0] == 1) is add_bos
    assert tokenizer.encode("the", add_special_tokens=False)[0] != 1


def test_gguf_byte_level_gives_the_tokens_it_was_made_from(tmp_path: Path):
    made = load_tokenizer(write_gguf(tmp_path / "m.gguf", "gpt2", small_tokenizers.byte_level()))
    for text in ALL_TEXTS:
        token_ids = small_tokenizers.byte_level().encode(text).ids
        assert made.encode(text) == token_ids
        assert made.decode(token_ids) == small_tokenizers.byte_level().decode(token_ids)
    assert [made.is_special(i) for i in range(6)] == [True] * 5 + [False]
    assert made.apply_chat_template([{"role": "user", "content": "hi"}])[0] == "<|im_start|>user\nhi<|im_end|>\n"


def test_gguf_sentencepiece_gives_the_tokens_it_was_made_from(tmp_path: Path):
    made = load_tokenizer(write_gguf(tmp_path / "m.gguf", "llama", small_tokenizers.sentencepiece()))
    never = load_tokenizer(write_gguf(tmp_path / "n.gguf", "llama", small_tokenizers.sentencepiece(), add_space_prefix=False))
    for text in ALL_TEXTS:
        assert made.encode(text) == small_tokenizers.sentencepiece().encode(text).ids
        assert never.encode(text) == small_tokenizers.gemma_like().encode(text).ids
        assert never.decode(never.encode(text)) == text.replace("<|im_start|>", "").replace("<|im_end|>", "")


def test_gguf_sentencepiece_gives_the_tokens_of_transformers(tmp_path: Path):
    from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer

    from jaxserve.gguf_header import read_gguf_header

    path = write_gguf(tmp_path / "m.gguf", "llama", small_tokenizers.sentencepiece(), add_bos_token=False)
    metadata = read_gguf_header(path).metadata
    keys = {"tokenizer_type": "model", "tokens": "tokens", "scores": "scores", "token_type": "token_type"}
    theirs, _ = convert_gguf_tokenizer("llama", {name: metadata[f"tokenizer.ggml.{key}"] for name, key in keys.items()})
    made = load_tokenizer(path)
    for text in ALL_TEXTS:
        assert made.encode(text) == theirs.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "tekken"])
def test_gguf_text_is_split_as_by_transformers(pre: str):
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    assert list(_SPLITS[pre]) == [GGUF_PRE_TOKENIZER_SPLITS[pre]]


@pytest.mark.parametrize(("pre", "digits"), [("gpt-2", 1), ("smollm", 4), ("llama-bpe", 2), ("qwen2", 4), (None, 1)])
def test_gguf_digits_are_split_as_the_file_says(tmp_path: Path, pre: str | None, digits: int):
    backend = small_tokenizers.fast(small_tokenizers.byte_level()).backend_tokenizer
    model = json.loads(backend.to_str())
    for merge, token in ((["6", "7"], "67"), (["67", "8"], "678"), (["678", "9"], "6789")):
        model["model"]["merges"].append(merge)
        model["model"]["vocab"].setdefault(token, len(model["model"]["vocab"]) + 1)
    path = write_gguf(tmp_path / "m.gguf", "gpt2", Backend.from_str(json.dumps(model)), pre=pre)
    assert len(load_tokenizer(path).encode("6789", add_special_tokens=False)) == digits


@pytest.mark.parametrize(
    ("fields", "expected"),
    [({}, []), ({"add_bos_token": True}, [1]), ({"add_eos_token": True}, [2]), ({"pre": "llama-bpe"}, [1])],
    ids=["neither", "bos", "eos", "llama-3"],
)
def test_gguf_adds_bos_and_eos_as_the_file_says(tmp_path: Path, fields: dict[str, Any], expected: list[int]):
    tokenizer = load_tokenizer(write_gguf(tmp_path / "m.gguf", "gpt2", small_tokenizers.byte_level(), **fields))
    plain = tokenizer.encode("fox", add_special_tokens=False)
    assert [t for t in tokenizer.encode("fox") if t < len(SPECIAL)] == expected
    assert len(tokenizer.encode("fox")) == len(plain) + len(expected)


def test_gguf_files_that_cannot_be_used_are_one_line(tmp_path: Path):
    good = write_gguf(tmp_path / "good.gguf", "gpt2", small_tokenizers.byte_level())
    data = good.read_bytes()
    for name, content in (
        ("empty", b""),
        ("other", b"GGML" + data[4:]),
        ("short", data[:2000]),
        ("huge", data[:24] + b"\xff" * 8 + data[32:]),
    ):
        bad = tmp_path / f"{name}.gguf"
        bad.write_bytes(content)
        with pytest.raises(StartupError, match="not a GGUF file") as error:
            load_tokenizer(bad)
        assert "\n" not in str(error.value)
    for fields, message in (
        ({"pre": "martian"}, "martian"),
        ({"model": "bert"}, "'bert'"),
        ({"model": None}, "no usable tokenizer: its metadata lacks tokenizer.ggml.model$"),
        ({"merges": None}, "its metadata lacks tokenizer.ggml.merges$"),
        ({"tokens": None}, "its metadata lacks tokenizer.ggml.tokens$"),
        ({"tokens": 5}, "no usable tokenizer"),
        ({"merges": ["abc"]}, "no usable tokenizer"),
        ({"merges": ["zz qq"]}, "out of vocabulary"),
        ({"token_type": [1, 1]}, "no usable tokenizer"),
        ({"bos_token_id": "one"}, "'one' is no token id"),
    ):
        expected = UnsupportedModel if fields.get("pre") or fields.get("model") else StartupError
        bad = write_gguf(tmp_path / f"{message}.gguf", "gpt2", small_tokenizers.byte_level(), **fields)
        with pytest.raises(expected, match=message) as caught:
            load_tokenizer(bad)
        assert "\n" not in str(caught.value)


def test_folders_that_cannot_be_used_are_one_line(tmp_path: Path):
    with pytest.raises(ModelNotFound, match="neither"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(StartupError, match="cannot load the tokenizer") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_token_text_and_bytes(folder: Path):
    tokenizer = load_tokenizer(folder)
    token_ids = tokenizer.encode("the 😀<|im_end|>")
    assert b"".join(tokenizer.token_bytes(t) for t in token_ids) == "the 😀<|im_end|>".encode()
    assert tokenizer.token_text(token_ids[-1]) == "<|im_end|>"
    assert "\ufffd" in [tokenizer.token_text(t) for t in token_ids]
    assert tokenizer.token_bytes(10**6) == b""
    spm = Tokenizer(small_tokenizers.fast(small_tokenizers.sentencepiece()))
    assert b"".join(spm.token_bytes(t) for t in spm.encode("the 😀", add_special_tokens=False)) == " the 😀".encode()


def test_spans_are_bytes_of_the_input():
    tokenizer = Tokenizer(small_tokenizers.fast(small_tokenizers.byte_level()))
    for text in TEXTS:
        data = text.encode()
        spans = list(tokenizer.spans(text))
        assert [span.token_id for span in spans] == tokenizer.encode(text)
        assert all(data[span.start : span.stop].decode() == span.text for span in spans)
        assert (spans[0].start, spans[-1].stop) == (0, len(data))
    bos = Tokenizer(small_tokenizers.fast(small_tokenizers.sentencepiece())).spans("a").__next__()
    assert (bos.token_id, bos.start, bos.stop) == (1, 0, 0)


def test_half_a_surrogate_pair_is_refused():
    tokenizer = Tokenizer(small_tokenizers.fast(small_tokenizers.byte_level()))
    for call in (tokenizer.encode, tokenizer.spans):
        with pytest.raises(InvalidRequest, match="not valid Unicode"):
            call("a\ud800b")


def test_a_python_tokenizer_serves_too():
    from transformers import ByT5Tokenizer

    tokenizer = Tokenizer(ByT5Tokenizer())
    assert tokenizer.decode(tokenizer.encode("hé 😀")) == "hé 😀"
    assert tokenizer.encode("a", add_special_tokens=False) == [ord("a") + 3]
    assert tokenizer.is_special(tokenizer.encode("a")[-1])
    with pytest.raises(InvalidRequest, match="where in the text"):
        tokenizer.spans("a")


def test_other_threads_run_while_a_long_text_is_encoded():
    tokenizer = Tokenizer(small_tokenizers.fast(small_tokenizers.byte_level()))
    text = " ".join(TEXTS) * 2000
    done = threading.Event()
    ticks = 0

    def tick() -> None:
        nonlocal ticks
        while not done.is_set():
            ticks += 1
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    start = time.perf_counter()
    tokenizer.encode(text)
    elapsed = time.perf_counter() - start
    done.set()
    thread.join()
    assert ticks > 20 * elapsed, f"{ticks} ticks in {elapsed:.2f} s"


@pytest.mark.demo
def test_the_demo_model_gives_the_tokens_of_llama_cpp():
    from jaxserve.weights.demo import ensure_demo_model

    tokenizer = load_tokenizer(ensure_demo_model())
    goldens = json.loads((Path(__file__).parent / "goldens" / "llama_cpp_tokens.json").read_text())
    assert len(goldens) > 40
    for golden in goldens:
        assert tokenizer.encode(golden["text"]) == golden["token_ids"], golden["text"]


@pytest.mark.parametrize("make", [small_tokenizers.byte_level, small_tokenizers.sentencepiece])
def test_least_tokens_is_never_more_than_there_are(make: Any) -> None:
    tokenizer = Tokenizer(small_tokenizers.fast(make()))
    for text in [*ALL_TEXTS, " " * 50, "\u2581" * 50, "e\u0301" * 50, "aaaa", "\u4e2d" * 9]:
        assert tokenizer.least_tokens(text) <= len(tokenizer.encode(text, add_special_tokens=False)), text
    assert tokenizer.least_tokens("the quick brown fox " * 100) > 100  # and it tells something


def test_the_bound_knows_added_tokens_as_they_are_written() -> None:
    backend = small_tokenizers.byte_level()
    backend.add_special_tokens(["\u00e9\u00e8\u00e0" * 5])
    tokenizer = Tokenizer(small_tokenizers.fast(backend))
    text = "\u00e9\u00e8\u00e0" * 50
    assert len(tokenizer.encode(text, add_special_tokens=False)) == 10 >= tokenizer.least_tokens(text) > 0


def test_a_text_that_is_too_long_is_not_tokenized() -> None:
    backend = small_tokenizers.byte_level()
    tokenizer = Tokenizer(small_tokenizers.fast(backend))
    text = "abc " * 1000
    assert len(tokenizer.encode(text, limit=4000)) <= 4000
    with pytest.raises(ContextTooLong, match=f"at least {tokenizer.least_tokens(text)} tokens"):
        tokenizer.encode(text, limit=10)
    number = len(tokenizer.encode(text))
    with pytest.raises(ContextTooLong, match=f"has {number} tokens"):
        tokenizer.encode(text, limit=number - 1)


def test_no_bound_where_text_may_get_lost() -> None:
    assert Tokenizer(small_tokenizers.fast(small_tokenizers.word_pieces())).least_tokens("a" * 100) == 0
    backend = small_tokenizers.byte_level()
    backend.normalizer = Strip()
    assert Tokenizer(small_tokenizers.fast(backend)).least_tokens("a" * 100) == 0
    backend.normalizer = NFC()
    composing = Tokenizer(small_tokenizers.fast(backend))
    assert composing.least_tokens("e\u0301" * 100) == 0 < composing.least_tokens("e" * 100)
