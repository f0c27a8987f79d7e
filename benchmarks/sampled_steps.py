"""What each sampling option adds to a decode step of the whole engine: `python -m benchmarks.sampled_steps FOLDER [--cases NAME ...]`.

FOLDER holds a config.json and a tokenizer; the weights are random. The same prompts decode under one option after the other, forwards and
then backwards through the cases, so that a drift of the card's heat cancels. Prompts come from the prefix cache after the first time. A
figure is the median time between two steps; the first steps of a turn are not counted.

A difference between options need not be the sampler's: equal rows might draw less power, and a card at its power limit lowers its clock.
So a line tells how many different tokens a step chose, the clock and the power (nvidia-smi's, where there is one), and there are pairs of
cases with the same work in the sampler and different tokens: `one token` and `own token` force them by logit bias; `one seed` draws with
one noise for all rows; `min_p 1` does all that sampling does and keeps the likeliest token.
"""

import argparse
import itertools
import logging
import random
import shutil
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.rows import add_row_flags, command_line, make_rows
from jaxserve import LLM, SamplingParams
from jaxserve.engine import Engine
from jaxserve.request import Request

BASELINE, DIVERSE = "greedy", "own token"
_PARTS = ("schedule", "dispatch", "device", "collect")
# Options of row r of R.
CASES: dict[str, Callable[[int], dict[str, object]]] = {
    BASELINE: lambda row: {"temperature": 0.0},
    "one token": lambda row: {"temperature": 0.0, "logit_bias": {100: 100.0}},
    DIVERSE: lambda row: {"temperature": 0.0, "logit_bias": {100 + row: 100.0}},
    "min_p 1": lambda row: {"temperature": 0.8, "min_p": 1.0},
    "sampled": lambda row: {"temperature": 0.8},
    "top_p": lambda row: {"temperature": 0.8, "top_p": 0.95},
    "top_p, one seed": lambda row: {"temperature": 0.8, "top_p": 0.95, "seed": 7},
    "top_p 0.5": lambda row: {"top_p": 0.5},
    "min_p 0.05": lambda row: {"min_p": 0.05},
    "top_k 50": lambda row: {"top_k": 50},
    "top_k 200": lambda row: {"top_k": 200},
    "top_k 20, top_p 0.8": lambda row: {"top_k": 20, "top_p": 0.8},
    "typical_p 0.9": lambda row: {"typical_p": 0.9},
    "repetition": lambda row: {"temperature": 0.0, "repetition_penalty": 1.1},
    "frequency": lambda row: {"temperature": 0.0, "frequency_penalty": 0.5, "presence_penalty": 0.5},
    "seed": lambda row: {"temperature": 0.8, "top_p": 0.95, "seed": row},
    "logprobs 0": lambda row: {"temperature": 0.0, "logprobs": 0},
    "logprobs 5": lambda row: {"temperature": 0.0, "logprobs": 5},
    "logprobs 20": lambda row: {"temperature": 0.0, "logprobs": 20},
    "top_p, logprobs 5": lambda row: {"temperature": 0.8, "top_p": 0.95, "logprobs": 5},
}
WHY = (BASELINE, "one token", DIVERSE, "min_p 1", "sampled", "top_p", "top_p, one seed", "top_k 50")


@dataclass
class Turn:
    """What was seen while a case ran.

    Attributes:
        steps: milliseconds between two steps.
        host: milliseconds a step by part.
        different: tokens that a step chose, without repetition; one entry a step.
        clocks, watts: one entry a reading.
    """

    steps: list[float] = field(default_factory=list)
    host: dict[str, list[float]] = field(default_factory=dict)
    different: list[int] = field(default_factory=list)
    clocks: list[float] = field(default_factory=list)
    watts: list[float] = field(default_factory=list)


class Card:
    """Readings of the first GPU's clock (MHz) and power (W), ten a second; none where there is no nvidia-smi."""

    def __init__(self) -> None:
        self.readings: list[tuple[float, float, float]] = []  # at, clock, watts

    @contextmanager
    def watched(self) -> Iterator["Card"]:
        """Read until the context ends."""
        tool = shutil.which("nvidia-smi")
        if tool is None:
            yield self
            return
        query = [tool, "-i", "0", "--query-gpu=clocks.sm,power.draw.instant", "--format=csv,noheader,nounits", "-lms", "100"]
        with subprocess.Popen(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            thread = threading.Thread(target=self._read, args=(process,), daemon=True)
            thread.start()
            try:
                yield self
            finally:
                process.terminate()
                thread.join(5)

    def since(self, begin: float) -> list[tuple[float, float, float]]:
        """Readings after a time of time.monotonic."""
        return [reading for reading in list(self.readings) if reading[0] >= begin]

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            values = line.split(",")
            if len(values) == 2 and all(value.strip().replace(".", "").isdigit() for value in values):
                self.readings.append((time.monotonic(), float(values[0]), float(values[1])))


class Steps:
    """Decode steps of one engine.

    Args:
        count: requests.
        tokens_in: of a prompt.
        settle, measured: steps of a turn that are not counted, and that are.
    """

    def __init__(self, engine: Engine, card: Card, count: int, tokens_in: int, settle: int, measured: int):
        self._engine, self._card = engine, card
        self._settle, self._measured = settle, measured
        largest = min(49000, engine.info.vocab_size)
        numbers = random.Random(0)
        self._prompts = [tuple(numbers.randrange(3, largest) for _ in range(tokens_in)) for _ in range(count)]
        self._ids = itertools.count()

    def run(self, options: Callable[[int], dict[str, object]], turn: Turn) -> None:
        """Serve all prompts under an option."""
        # The first token comes with the prompt; the last few steps may have fewer rows.
        length = 2 + self._settle + self._measured
        for row, prompt in enumerate(self._prompts):
            params = SamplingParams(**options(row), max_tokens=length, ignore_eos=True)  # pyright: ignore[reportArgumentType]
            self._engine.add_request(Request(f"{next(self._ids)}", prompt, params))
        full, at, begin = 0, 0.0, 0.0
        before = self._engine.stats()
        while self._engine.has_work:
            outputs = self._engine.step()
            now = time.monotonic()
            if len(outputs) < len(self._prompts):
                continue
            full += 1
            if full == self._settle:
                before, begin = self._engine.stats(), now
            elif self._settle < full <= self._settle + self._measured:
                turn.steps.append((now - at) * 1000)
                turn.different.append(len({output.token_ids[0] for output in outputs}))
            if full == self._settle + self._measured:
                self._note(before, begin, turn)
            at = now

    def _note(self, before: object, begin: float, turn: Turn) -> None:
        after = self._engine.stats()
        for part in _PARTS:
            name = f"{part}_seconds"
            turn.host.setdefault(part, []).append((getattr(after, name) - getattr(before, name)) * 1000 / self._measured)
        for _, clock, watts in self._card.since(begin):
            turn.clocks.append(clock)
            turn.watts.append(watts)


def table(turns: dict[str, Turn]) -> str:
    """One line a case."""

    def mean(values: list[float] | list[int], digits: int) -> str:
        return f"{statistics.fmean(values):.{digits}f}" if values else "-"

    def step(name: str) -> float | None:
        return statistics.median(turns[name].steps) if name in turns else None

    lines = [f"{'case':20s} {'step ms':>8s} {'extra':>7s} {'to own':>7s} {'tokens':>6s} {'MHz':>6s} {'W':>5s}  " + "  ".join(_PARTS)]
    for name, turn in turns.items():
        own = statistics.median(turn.steps)
        extras = [f"{own - other:7.3f}" if (other := step(base)) is not None else "      -" for base in (BASELINE, DIVERSE)]
        host = "  ".join(mean(turn.host[part], 3) for part in _PARTS)
        seen = f"{mean(turn.different, 0):>6s} {mean(turn.clocks, 0):>6s} {mean(turn.watts, 0):>5s}"
        lines.append(f"{name:20s} {own:8.3f} {' '.join(extras)} {seen}  {host}")
    return "\n".join(lines)


def main() -> None:
    """Read the arguments and measure."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--label", default="", help="part of the rows' names, for a shape that is not the 8B one: 1b")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--why", action="store_true", help="only the cases that part the sampler's work from the tokens'")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--tokens-in", type=int, default=1024)
    parser.add_argument("--settle", type=int, default=24, help="steps of a turn before those that count, at least one")
    parser.add_argument("--steps", type=int, default=64, help="steps of a turn that count")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--max-total-tokens", type=int, default=32768)
    add_row_flags(parser)
    arguments = parser.parse_args()
    logging.basicConfig(format="%(asctime)s %(message)s")
    begin = time.perf_counter()
    llm = LLM(str(arguments.folder), load_format="dummy", max_total_tokens=arguments.max_total_tokens)
    print(f"ready after {time.perf_counter() - begin:.1f} s on {llm.info.device}, {llm.info.dtype}", flush=True)
    begin = time.perf_counter()
    names = list(WHY if arguments.why else arguments.cases)
    turns = {name: Turn() for name in names}
    with Card().watched() as card:
        steps = Steps(llm.engines[0], card, arguments.batch_size, arguments.tokens_in, arguments.settle, arguments.steps)
        steps.run(CASES[BASELINE], Turn())  # the prompts' pages
        for turn in range(arguments.turns):
            for name in names[:: -1 if turn % 2 else 1]:
                steps.run(CASES[name], turns[name])
    stats = llm.engines[0].stats()
    print(f"{time.perf_counter() - begin:.1f} s for {stats.num_steps} steps, {stats.compile_events} compile events")
    rows = make_rows(arguments, llm.info.device)
    label = f"{arguments.label}_" if arguments.label else ""
    if BASELINE in turns:
        for name in names[1:]:
            extra = statistics.median(turns[name].steps) - statistics.median(turns[BASELINE].steps)
            slug = name.replace(", ", "_").replace(" ", "_").replace(".", "")
            rows.add(f"{slug}_extra_{label}ms_b{arguments.batch_size}", extra, "ms", command_line("benchmarks.sampled_steps"))
    print(table(turns), flush=True)


if __name__ == "__main__":
    main()
