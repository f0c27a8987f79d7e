"""Whether a device keeps what RunnerConfig.deterministic promises, tried out before the server is ready.

Our own kernels keep it by construction, in steps of all sizes (pallas_kernels/matmul/fixed_order.py), as far as it is known how a tensor
core adds up. XLA's products are libraries': one program has one algorithm, but nobody promises that an algorithm computes every row of a
matrix alike (Stream-K, Osama et al., arXiv 2301.03598, does not).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from jaxserve.request import MAX_TOP_LOGPROBS, Request, SamplingParams
from jaxserve.runner.batch import Batch
from jaxserve.step import StepResult

_MOST_PROMPT_TOKENS = 8  # a start waits for the steps that they take
_LONG_PROMPT_TOKENS = 330
LONG = -1
_PARAMS = SamplingParams(temperature=1.0, seed=1, max_tokens=1, logprobs=MAX_TOP_LOGPROBS)


class Runner[Step](Protocol):
    """What is tried out."""

    def dispatch(self, batch: Batch) -> Step: ...
    def collect(self, step: Step) -> StepResult: ...


@dataclass
class _Sample:
    request: Request
    slot: int
    page_tables: list[list[int]]
    number: int
    params: SamplingParams = _PARAMS
    seed: int = 1

    @property
    def token_ids(self) -> Sequence[int]:
        return self.request.prompt_token_ids


@dataclass
class _Row:
    sample: _Sample
    start: int
    token_ids: Sequence[int]
    samples: bool
    new_slot: bool
    num_output_tokens: int = 0
    num_scored: int = 0

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


@dataclass
class _Batch:
    rows: list[_Row]
    page_copies: list[tuple[int, int, int]] = field(default_factory=list)
    num_scored: int = 0

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.rows)


def row_bits[Step](
    runner: Runner[Step], *, num_rows: int, num_tokens: int, page_size: int, num_pages: Sequence[int], max_total_tokens: int
) -> dict[int, set[bytes]]:
    """Compute short prompts, one for each row, in several places of steps: whole, then their last tokens by themselves, and one alone.

    It overwrites pages and slots, which must be nobody's. The prompts differ, as a sum in another order mostly has the same bits.

    Args:
        runner: its programs are compiled.
        num_rows, num_tokens: that fill a step.
        num_pages: of each KV group.
        max_total_tokens: of a request.

    Returns:
        All the bits that each prompt got, by its number, which stands for the same prompt in every call with as long a one. LONG is a
        prompt of several blocks of attention's, in chunks that fill a step, and its last token by itself.
    """
    num_rows = min(num_rows, *num_pages)
    length = min(page_size, num_tokens, _MOST_PROMPT_TOKENS)
    found: dict[int, set[bytes]] = {slot: set() for slot in range(num_rows)}

    def sample(slot: int) -> _Sample:
        ids = tuple(1 + 2 * place + (slot >> place & 1) for place in range(length))  # below 17: of any vocabulary
        return _Sample(Request("", ids, _PARAMS), slot, [[slot] for _ in num_pages], slot)

    def compute(samples: Sequence[_Sample], start: int, end: int) -> None:
        """Some tokens of each, of as many a step as fit."""
        together = num_tokens // (end - start)
        for first in range(0, len(samples), together):
            rows = [
                _Row(one, start, one.token_ids[start:end], end == len(one.token_ids), start == 0)
                for one in samples[first : first + together]
            ]
            result = runner.collect(runner.dispatch(_Batch(rows)))
            if rows[0].samples and (logprobs := result.logprobs) is not None:
                arrays = result.token_ids, logprobs.raw, logprobs.processed, logprobs.top_ids, logprobs.top_raw, logprobs.top_processed
                for i, row in enumerate(rows):
                    found[row.sample.number].add(b"".join(array[i].tobytes() for array in arrays))

    samples = [sample(slot) for slot in range(num_rows)]
    compute(samples, 0, length)
    compute(samples[-1:], 0, length)
    if length > 1:
        compute(samples, 0, length - 1)
        compute(samples[::-1], length - 1, length)

    length = min(_LONG_PROMPT_TOKENS, max_total_tokens - 1, page_size * min(num_pages))
    pages = list(range(-(-length // page_size)))
    long = _Sample(Request("", tuple(1 + i * i % 16 for i in range(length)), _PARAMS), 0, [pages for _ in num_pages], LONG)
    found[LONG] = set()
    for start in (*range(0, length, num_tokens), length - 1):
        end = min(length, start + num_tokens)
        compute([long], start, end)
    return found
