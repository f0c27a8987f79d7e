"""The requests of a benchmark: how long their prompts are, what is in them, and how many tokens they ask for."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from jaxserve.bench.options import WorkloadOptions
from jaxserve.errors import StartupError

# ShareGPT's filter in `vllm bench`, in tokens.
MIN_LENGTH, MAX_INPUT, MAX_TOTAL = 4, 1024, 2048
# Log-normal (median, sigma): draws that pass the filter have a mean of about 220 prompt and 200 output tokens, most of them short.
SHAREGPT_INPUT = (170.0, 1.8)
SHAREGPT_OUTPUT = (120.0, 1.1)


class Encoder(Protocol):
    """The part of a tokenizer that a workload needs."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, token_ids: list[int]) -> str: ...


@dataclass(frozen=True, slots=True)
class WorkItem:
    """One request of a benchmark.

    Attributes:
        token_ids: the prompt, where it was made of ids.
        text: the prompt, where it was made of text.
        input_len, output_len: tokens.
    """

    token_ids: tuple[int, ...]
    text: str
    input_len: int
    output_len: int


def make_workload(options: WorkloadOptions, vocab_size: int, tokenizer: Encoder) -> list[WorkItem]:
    """The requests, the same for the same options.

    Args:
        vocab_size: random ids are drawn uniformly below it.

    Raises:
        StartupError: --dataset-path cannot be read or holds too few conversations.
    """
    rng = np.random.default_rng(options.seed)
    if options.dataset_path is not None:
        return _read_sharegpt(options, rng, tokenizer)
    lengths = _sharegpt_lengths(rng) if options.dataset == "sharegpt" else _random_lengths(options, rng)
    items = []
    for _ in range(options.num_prompts):
        input_len, output_len = next(lengths)
        items.append(WorkItem(draw_ids(rng, input_len, vocab_size), "", input_len, output_len))
    return items


def draw_ids(rng: np.random.Generator, count: int, vocab_size: int) -> tuple[int, ...]:
    """Token ids, uniform over the vocabulary."""
    return tuple(rng.integers(0, vocab_size, count).tolist())


def as_text(item: WorkItem, tokenizer: Encoder) -> str:
    """A text that encodes to the item's length: decoded and encoded again until it does, 10 times at most (as `vllm bench` does)."""
    if item.text:
        return item.text
    wanted = list(item.token_ids)
    text = tokenizer.decode(wanted)
    for _ in range(10):
        encoded = tokenizer.encode(text)
        if len(encoded) == item.input_len:
            break
        encoded = encoded[: item.input_len]
        text = tokenizer.decode(encoded + wanted[: item.input_len - len(encoded)])
    return text


def _random_lengths(options: WorkloadOptions, rng: np.random.Generator) -> Iterator[tuple[int, int]]:
    def draw(length: int) -> int:
        low, high = np.floor(length * (1 - options.random_range_ratio)), np.ceil(length * (1 + options.random_range_ratio))
        return int(rng.integers(max(1, int(low)), int(high) + 1))

    while True:
        yield draw(options.random_input_len), draw(options.random_output_len)


def _sharegpt_lengths(rng: np.random.Generator) -> Iterator[tuple[int, int]]:
    while True:
        input_len = int(rng.lognormal(np.log(SHAREGPT_INPUT[0]), SHAREGPT_INPUT[1]))
        output_len = int(rng.lognormal(np.log(SHAREGPT_OUTPUT[0]), SHAREGPT_OUTPUT[1]))
        if _kept(input_len, output_len):
            yield input_len, output_len


def _read_sharegpt(options: WorkloadOptions, rng: np.random.Generator, tokenizer: Encoder) -> list[WorkItem]:
    """First question and first answer of conversations in random order; the answer's length is what is asked for."""
    try:
        with open(options.dataset_path or "", encoding="utf-8") as file:
            conversations = [c["conversations"] for c in json.load(file) if len(c["conversations"]) >= 2]
    except OSError as error:
        raise StartupError(f"cannot read {options.dataset_path}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError):
        raise StartupError(f"{options.dataset_path} is not a ShareGPT file: a list of objects with `conversations`") from None
    items: list[WorkItem] = []
    for index in rng.permutation(len(conversations)):
        question, answer = (str(turn.get("value", "")) for turn in conversations[index][:2])
        token_ids, output_len = tokenizer.encode(question), len(tokenizer.encode(answer))
        if _kept(len(token_ids), output_len):
            items.append(WorkItem(tuple(token_ids), question, len(token_ids), output_len))
        if len(items) == options.num_prompts:
            return items
    raise StartupError(f"{options.dataset_path} has {len(items)} usable conversations, fewer than --num-prompts {options.num_prompts}")


def _kept(input_len: int, output_len: int) -> bool:
    return MIN_LENGTH <= input_len <= MAX_INPUT and output_len >= MIN_LENGTH and input_len + output_len <= MAX_TOTAL
