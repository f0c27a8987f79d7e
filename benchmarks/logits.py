"""Logits at every position of prompts, through the runner's own programs, against benchmarks.plain_llama.

A step samples a row's last token only, so a prompt is computed again and again with its borders elsewhere. Four ways, because they take
different kernels and bring the keys and values into the cache differently:

whole   chunks as large as a step; positions are the ends of the chunks
spread  as many chunks as a step has rows, all of the same prompt, one behind the other; each round shifted by one token: all positions
decode  after `whole`, rows of one token, one behind the other: all positions
mixed   several prompts at once, rows of one token beside chunks of any length; positions are the ends of the rows
"""

import statistics
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.plain_llama import BLOCK, GOLDEN, GOLDEN_TOKENS, NOT_AUTOTUNED, Float32Llama, golden_columns, prompt_tokens
from jaxserve.models import Model
from jaxserve.request import Request, SamplingParams
from jaxserve.runner import ModelRunner, RunnerConfig
from jaxserve.scheduler.batch import ScheduledBatch, ScheduledRow

MAX_RELATIVE_ERROR, MAX_DIVERGENCE = 2e-2, 1e-3  # relative L2; Kullback-Leibler, nats
MAX_REFERENCE_ERROR = 1e-4  # of the reference itself against float64

type Piece = tuple[int, int, int]  # prompt, first position, tokens


@dataclass
class Occupant:
    """What a step must know of a sample (runner.batch.Sample)."""

    request: Request
    params: SamplingParams
    index: int
    slot: int
    token_ids: Sequence[int]
    page_tables: Sequence[Sequence[int]]
    seed: int = 0


class Prompts:
    """Prompts in the KV cache of a runner that serves nothing else. Slots are shared out evenly; those of a prompt share its pages.

    Args:
        config: the runner's.
        prompts: token ids of each.
    """

    def __init__(self, runner: ModelRunner, config: RunnerConfig, prompts: Sequence[np.ndarray]):
        self.prompts = prompts
        self.max_tokens = config.max_batch_tokens
        self.slots_each = config.max_batch_size // len(prompts)
        self._runner = runner
        counts = [-(-len(prompt) // config.page_size) for prompt in prompts]
        num_pages = min(pages for pages, _ in runner.kv_groups)
        assert sum(counts) <= num_pages, f"the KV cache has {num_pages} pages, {sum(counts)} are needed"
        # In no order: reading them in the order of the pool must not work by chance.
        pages = iter(np.random.default_rng(2).permutation(num_pages).tolist())
        params = SamplingParams(temperature=0.0)
        self._occupants: list[list[Occupant]] = []
        self._is_new = [True] * config.max_batch_size
        slots = iter(range(config.max_batch_size))
        for number, (prompt, count) in enumerate(zip(prompts, counts, strict=True)):
            table, ids = array("q", [next(pages) for _ in range(count)]), prompt.tolist()
            request = Request(f"prompt-{number}", tuple(ids), params)
            tables = [table] * len(runner.kv_groups)
            self._occupants.append([Occupant(request, params, 0, next(slots), ids, tables) for _ in range(self.slots_each)])

    def run(self, pieces: Sequence[Piece]) -> jax.Array:
        """Compute pieces in one step; float32 logits [rows of the bucket, V or wider] of the last token of each, cut over the mesh."""
        used = [0] * len(self.prompts)
        rows = []
        for number, start, count in pieces:
            occupant = self._occupants[number][used[number]]
            used[number] += 1
            ids = occupant.token_ids[start : start + count]
            rows.append(ScheduledRow(occupant, start, count, ids, True, self._is_new[occupant.slot], 0))  # pyright: ignore
            self._is_new[occupant.slot] = False
        step = self._runner.forward(ScheduledBatch(rows, num_tokens=sum(count for _, _, count in pieces)))  # pyright: ignore
        logits = self._runner.logits
        self._runner.sample(step)
        self._runner.collect(step)
        return logits


def whole(prompts: Prompts) -> Iterator[list[Piece]]:
    """Steps of one prompt after the other in the largest chunks."""
    for number, prompt in enumerate(prompts.prompts):
        for start in range(0, len(prompt), prompts.max_tokens):
            yield [(number, start, min(prompts.max_tokens, len(prompt) - start))]


def spread(prompts: Prompts) -> Iterator[list[Piece]]:
    """Steps full of chunks of each prompt, all borders once."""
    length = prompts.max_tokens // prompts.slots_each
    for number, prompt in enumerate(prompts.prompts):
        for shift in range(min(length, len(prompt))):
            borders = [0, *range(shift + 1, len(prompt) + 1, length)]
            chunks = [(number, start, end - start) for start, end in pairwise(borders)]
            # The first chunk is shorter, so that a step of `slots_each` chunks never has too many tokens.
            for begin in range(0, len(chunks), prompts.slots_each):
                yield chunks[begin : begin + prompts.slots_each]


def decode(prompts: Prompts) -> Iterator[list[Piece]]:
    """Steps of rows of one token, over a cache that holds what is before them."""
    for number, prompt in enumerate(prompts.prompts):
        for start in range(0, len(prompt), prompts.slots_each):
            yield [(number, at, 1) for at in range(start, min(start + prompts.slots_each, len(prompt)))]


def mixed(prompts: Prompts, seed: int = 3) -> Iterator[list[Piece]]:
    """Steps in which every prompt that is not done takes part, half of them with one token."""
    rng = np.random.default_rng(seed)
    done = [0] * len(prompts.prompts)
    share = prompts.max_tokens // len(prompts.prompts)
    while any(start < len(prompt) for start, prompt in zip(done, prompts.prompts, strict=True)):
        pieces = []
        for number, prompt in enumerate(prompts.prompts):
            left = len(prompt) - done[number]
            count = min(left, 1 if rng.random() < 0.5 else int(rng.integers(1, share + 1)))
            if count:
                pieces.append((number, done[number], count))
                done[number] += count
        yield sorted(pieces, key=lambda piece: piece[2] > 1)


@dataclass
class Errors:
    """How far logits are from the reference's, by position."""

    relative: list[float] = field(default_factory=list)
    divergence: list[float] = field(default_factory=list)
    positions: list[Piece] = field(default_factory=list)
    num_steps: int = 0

    def line(self, name: str) -> str:
        """Median and worst, and where."""
        worst = int(np.argmax(self.relative))
        number, start, count = self.positions[worst]
        return (
            f"{name:8s} {len(self.positions):7d} positions {self.num_steps:5d} steps"
            f"  L2 {statistics.median(self.relative):.1e}, worst {self.relative[worst]:.1e} (prompt {number}, {start}+{count})"
            f"  KL {statistics.median(self.divergence):.1e}, worst {max(self.divergence):.1e}"
        )

    @property
    def within(self) -> bool:
        """Whether every position is within the bounds; NaN never is."""
        return all(e <= MAX_RELATIVE_ERROR for e in self.relative) and all(e <= MAX_DIVERGENCE for e in self.divergence)


class Reference:
    """The plain model on the weights of a loaded one (one device)."""

    def __init__(self, model: Model, config: Mapping[str, Any]):
        self._config = config
        self._model = model
        self._places: dict[str, tuple[int, int, int]] = {}  # leaf, first row, end
        for leaf, parameter in enumerate(model.architecture.parameters):
            row = 0
            for source in parameter.sources:
                self._places[source.name] = leaf, row, row + source.shape[0]
                row += source.shape[0]

        self._plain = Float32Llama(config, self._tensor)

        def compare(hidden: jax.Array, places: jax.Array, head: jax.Array, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
            expected = self._logits(hidden[places], head)
            error = jnp.linalg.norm(logits - expected, axis=1) / jnp.linalg.norm(expected, axis=1)
            p, q = jax.nn.log_softmax(expected), jax.nn.log_softmax(logits)
            return error, jnp.sum(jnp.exp(p) * (p - q), axis=1)

        self._compare = jax.jit(compare, compiler_options=NOT_AUTOTUNED)

    def hidden(self, prompts: Sequence[np.ndarray]) -> jax.Array:
        """Hidden states of prompts, each padded to the longest: float32 [prompts x T, hidden]."""
        longest = max(map(len, prompts))
        length = longest if longest <= BLOCK else -(-longest // BLOCK) * BLOCK
        return jnp.concatenate([self._plain.hidden(np.pad(prompt, (0, length - len(prompt)))) for prompt in prompts])

    def compare(self, hidden: jax.Array, stride: int, pieces: Sequence[Piece], logits: jax.Array, errors: Errors) -> None:
        """Add a step's errors; hidden states of a prompt begin at its number times `stride`."""
        places = np.zeros(logits.shape[0], np.int32)
        places[: len(pieces)] = [number * stride + start + count - 1 for number, start, count in pieces]
        head = self._head
        here = jax.device_put(logits, hidden.sharding)[:, : len(head)]
        relative, divergence = self._compare(hidden, jnp.asarray(places), head, here)
        errors.relative += np.asarray(relative)[: len(pieces)].tolist()
        errors.divergence += np.asarray(divergence)[: len(pieces)].tolist()
        errors.positions += pieces
        errors.num_steps += 1

    def error_to_golden(self) -> float:
        """Relative L2 distance of the reference to the float64 golden, of all its logits and normalizers; the model must have its shape."""
        golden = np.load(GOLDEN)
        hidden = self.hidden([prompt_tokens(GOLDEN_TOKENS, self._config["vocab_size"])])
        logits = np.asarray(jax.jit(self._logits, compiler_options=NOT_AUTOTUNED)(hidden, self._head))
        wide = logits.astype(np.float64)
        found = np.concatenate([wide[:, golden_columns(self._config["vocab_size"])], np.log(np.exp(wide).sum(axis=1))[:, None]], axis=1)
        expected = np.concatenate([golden["logits"], golden["log_sums"][:, None]], axis=1)
        return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))

    @property
    def _head(self) -> jax.Array:
        return self._tensor("model.embed_tokens.weight" if self._config.get("tie_word_embeddings") else "lm_head.weight")

    @staticmethod
    def _logits(hidden: jax.Array, head: jax.Array) -> jax.Array:
        return jnp.matmul(hidden, head.astype(jnp.float32).T, precision=jax.lax.Precision.HIGHEST)

    def _tensor(self, name: str) -> jax.Array:
        leaf, begin, end = self._places[name]
        return self._model.leaves[leaf][begin:end]


def check_logits(
    runner: ModelRunner, config: RunnerConfig, model: Model, shape: Mapping[str, Any], longest: int, say: Callable[[str], None] = print
) -> bool:
    """Hold the runner against the reference, on one prompt of `longest` tokens and on several at once.

    Args:
        runner: warmed up, with nothing in flight.
        model: the same weights on one device, the first of the runner's.
        shape: config.json of the model.

    Returns:
        whether all errors are within the bounds.
    """
    reference = Reference(model, shape)
    vocab_size = shape["vocab_size"]
    one = [prompt_tokens(longest, vocab_size, seed=4)]
    lengths = [length for length in (1, 2, 17, 100, 600, 1500, 3000, 5000) if length <= longest][: config.max_batch_size]
    several = [prompt_tokens(length, vocab_size, seed=5 + length) for length in lengths]
    good = True
    for names, tokens in ((("whole", "spread", "whole", "decode"), one), (("mixed",), several)):
        prompts, hidden = Prompts(runner, config, tokens), reference.hidden(tokens)
        for name in names:
            errors = Errors()
            for pieces in WAYS[name](prompts):
                reference.compare(hidden, len(hidden) // len(tokens), pieces, prompts.run(pieces), errors)
            say(errors.line(name))
            good &= errors.within
    return good


WAYS: dict[str, Callable[[Prompts], Iterator[list[Piece]]]] = {"whole": whole, "spread": spread, "decode": decode, "mixed": mixed}
