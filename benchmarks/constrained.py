"""What grammars cost a decode step: all requests constrained, and one among free ones.

    python -m benchmarks.constrained FOLDER [--all 64] [--one-among 256] [--results FILE]

FOLDER holds a config.json and a tokenizer; the weights are random. A constrained request writes a JSON array that may not end, of
objects with a string, an integer and an enum. Temperature 1, `ignore_eos`, all requests sent at once; prompts are token ids uniform in
3..48999, new ones for every run. A step is (time of [in, out] - time of [in, 1]) / (out - 1), the median of the repetitions, free
and constrained runs in turns.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable

from benchmarks.rows import Rows, add_row_flags, command_line, make_rows
from jaxserve import LLM, SamplingParams
from jaxserve.grammar import Grammar

ITEM = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "size": {"type": "integer"}, "kind": {"enum": ["red", "green", "blue"]}},
    "required": ["name", "size", "kind"],
    "additionalProperties": False,
}
GRAMMAR = Grammar.json_schema({"type": "array", "items": ITEM, "minItems": 10**6})


class Runs:
    """Runs of requests of which some are constrained."""

    def __init__(self, llm: LLM, tokens_in: int, tokens_out: int):
        self._llm = llm
        self._in, self._out = tokens_in, tokens_out
        self._random = random.Random(0)
        self._largest_id = min(49000, llm.info.vocab_size)

    def step_milliseconds(self, count: int, num_constrained: int) -> float:
        """A decode step of `count` requests."""
        first, whole = (self._seconds(count, num_constrained, tokens) for tokens in (1, self._out))
        return (whole - first) / (self._out - 1) * 1000

    def _seconds(self, count: int, num_constrained: int, tokens_out: int) -> float:
        prompts = [[self._random.randrange(3, self._largest_id) for _ in range(self._in)] for _ in range(count)]
        grammars = [GRAMMAR if number < num_constrained else None for number in range(count)]
        params = [SamplingParams(max_tokens=tokens_out, ignore_eos=True, grammar=grammar) for grammar in grammars]
        begin = time.perf_counter()
        outputs = self._llm.generate(prompts, params)
        seconds = time.perf_counter() - begin
        assert all(len(output.outputs[0].token_ids) == tokens_out for output in outputs), "a request ended early: the run is void"
        return seconds


def compare(rows: Rows, name: str, repetitions: int, free: Callable[[], float], constrained: Callable[[], float]) -> None:
    """Two rows: a constrained step, and how much longer than a free one it is."""
    constrained()  # what is paid once
    free()
    turns = [(free(), constrained()) for _ in range(repetitions)]
    before, after = (statistics.median(column) for column in zip(*turns, strict=True))
    rows.add(f"constrained_{name}_step_ms", after, "ms", command_line("benchmarks.constrained"))
    rows.add(f"constrained_{name}_extra", (after / before - 1) * 100, "%", command_line("benchmarks.constrained"))


def main() -> None:
    """Read the arguments and measure."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--all", type=int, default=64, help="requests of the run in which all are constrained")
    parser.add_argument("--one-among", type=int, default=256, help="requests of the run in which one is")
    parser.add_argument("--tokens-in", type=int, default=1024)
    parser.add_argument("--tokens-out", type=int, default=257)
    parser.add_argument("--max-total-tokens", type=int, default=32768)
    parser.add_argument("--max-batch-size", type=int, help="the engine's flag")
    parser.add_argument("--repetitions", type=int, default=3)
    add_row_flags(parser)
    arguments = parser.parse_args()
    options = dict(prefix_caching=False, max_total_tokens=arguments.max_total_tokens, max_batch_size=arguments.max_batch_size)
    llm = LLM(arguments.folder, load_format="dummy", **options)
    rows = make_rows(arguments, llm.info.device)
    runs, count, among = Runs(llm, arguments.tokens_in, arguments.tokens_out), arguments.all, arguments.one_among
    pairs = {f"b{count}": (count, count), f"1_of_b{among}": (among, 1)}
    for name, (total, num_constrained) in pairs.items():
        free, constrained = (lambda n=n, total=total: runs.step_milliseconds(total, n) for n in (0, num_constrained))
        compare(rows, name, arguments.repetitions, free, constrained)
    rows.show()


if __name__ == "__main__":
    main()
