"""The shapes that steps are compiled for."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Self

_FEWEST = 8  # rows of a decode step on a GPU: products take so many at least, and fewer would have to be padded before each
_MOST_WHOLE = 1024  # tokens; in smaller steps a layer's products of the sampled rows alone cost almost as much as those of all
_FEW = 64  # rows of the small mixed shapes for prompts alone, on a GPU
# Of weights on a device, which a step reads in 2 ms: steps of up to 64 rows then take no longer than the host's work, rarely above 2.5 ms.
_SMALL_BYTES = 8 << 30


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """One shape.

    Attributes:
        num_tokens: T, tokens computed.
        num_rows: R, rows sampled.
        decode_only: each row has exactly one token (T == R).
    """

    num_tokens: int
    num_rows: int
    decode_only: bool


class Buckets:
    """All shapes of a runner, and which one a batch takes.

    Args:
        decode: row counts of the decode-only shapes, ascending.
        mixed: (tokens, rows) of the others.
        logits: row counts of logits, which the sampler is compiled for, ascending; None: those of the shapes.
        whole: rows of the decode-only shapes that have a program with the sampler in it, too. One launch less is 0.15 ms or more less of
            the host's time, and the steps of few streams, or of a small model, take no longer than that time.
        most_whole: tokens up to which a step computes the last layer of all of them; None: as `max_scored_tokens` says.
    """

    def __init__(
        self,
        decode: Iterable[int],
        mixed: Iterable[tuple[int, int]],
        logits: Iterable[int] | None = None,
        whole: Iterable[int] = (),
        most_whole: int | None = None,
    ):
        self._most_whole = most_whole
        self._decode = tuple(Bucket(rows, rows, True) for rows in decode)
        self._mixed = tuple(Bucket(tokens, rows, False) for tokens, rows in sorted(mixed))
        self.whole = tuple(Bucket(rows, rows, True) for rows in whole)
        self.logits = tuple(logits or sorted({bucket.num_rows for bucket in self}))

    @classmethod
    def for_platform(cls, platform: str, max_batch_size: int, max_batch_tokens: int, weight_bytes: int) -> Self:
        """Ladders of powers of two; finer on a GPU, where a program's compile time counts less than a step's padding.

        Small mixed shapes come with few rows (a prompt alone) and with all: the logits and the sampling of rows that are not there
        cost as much as some tens of tokens, which a large shape does not feel. On a GPU rows of logits are cheap (the head of the 8B's
        shape takes 250 us for 1 to 32 rows, 260 for 64) and samplers slow to compile, so there are few row counts.

        Beyond 1024 tokens the scheduler rather cuts a step than leave much padding in it: a step more costs as much as 200 tokens.

        Args:
            platform: "cpu", "gpu".
            max_batch_size: most rows of a step.
            max_batch_tokens: most tokens of a step.
            weight_bytes: of the model's weights, on each device.
        """
        if platform == "cpu":
            tokens = _ladder(32, max_batch_tokens)
            few = [(t, 4) for t in tokens if t <= 128 and max_batch_size > 4]
            return cls(_ladder(1, max_batch_size), (*few, *((t, max_batch_size) for t in tokens)))
        few = [(t, _FEW) for t in _ladder(16, min(max_batch_tokens, 1024)) if min(t, max_batch_size) > _FEW]
        mixed = (*few, *((t, min(t, max_batch_size)) for t in _ladder(16, max_batch_tokens, (64, 1), (256, 3), (1024, 1))))
        logits = sorted({min(rows, max_batch_size) for rows in (_FEWEST, _FEW, max_batch_size)})
        decode = _ladder(_FEWEST, max_batch_size, (16, 1), (64, 3))
        most_rows = _FEW if weight_bytes < _SMALL_BYTES else _FEWEST
        return cls(decode, mixed, logits, (rows for rows in decode if rows <= most_rows))

    @classmethod
    def deterministic(cls, max_batch_size: int, sizes: Iterable[int]) -> Self:
        """Steps of which each has all kinds of tokens; there are two counts of logits' rows at most.

        All compute their last layer whole: whichever sizes are given up, those that are left can score prompts.
        """
        mixed = [(tokens, min(tokens, max_batch_size)) for tokens in sizes]
        logits = sorted({_FEW if rows <= _FEW < max_batch_size else max_batch_size for _, rows in mixed})
        return cls((), mixed, logits, most_whole=max(tokens for tokens, _ in mixed))

    @staticmethod
    def deterministic_sizes(common_tokens: int, max_batch_tokens: int) -> tuple[int, ...]:
        """Tokens of deterministic steps, where products give a token the same bits in all of them: few, as each is compiled. Those of 32
        are left out: they would take about as long as those of 64.
        """
        return tuple(sorted({*_ladder(16, max_batch_tokens), common_tokens} - ({32} - {common_tokens, max_batch_tokens})))

    def having(self, sizes: Iterable[int]) -> Self:
        """Without the mixed shapes of other numbers of tokens; the rows of logits stay."""
        kept = [(bucket.num_tokens, bucket.num_rows) for bucket in self._mixed if bucket.num_tokens in set(sizes)]
        decode, whole = ([bucket.num_rows for bucket in buckets] for buckets in (self._decode, self.whole))
        return type(self)(decode, kept, self.logits, whole, self._most_whole)

    @property
    def step_sizes(self) -> tuple[int, ...]:
        """Tokens of the shapes that are not decode-only, ascending."""
        return tuple(sorted({bucket.num_tokens for bucket in self._mixed}))

    @property
    def max_scored_tokens(self) -> int:
        """Tokens of the largest shape that gives the last layer's state of every token, for the scores of prompts. Larger ones, which
        hold more tokens than rows, give it of the sampled rows alone, and their last layer computes little else.
        """
        fewest = max(self._most_whole or _MOST_WHOLE, *(bucket.num_rows for bucket in self))
        return min((tokens for tokens in self.step_sizes if tokens >= fewest), default=max(self.step_sizes))

    def __iter__(self) -> Iterator[Bucket]:
        """All of them."""
        return iter((*self._decode, *self._mixed))

    def logit_rows(self, bucket: Bucket) -> int:
        """Rows of a shape's logits: the fewest that hold its rows."""
        return next(rows for rows in self.logits if rows >= bucket.num_rows)

    def pick(self, num_tokens: int, num_rows: int) -> Bucket:
        """The smallest shape that holds a batch; where each row has one token a decode-only one, if there are such shapes.

        Raises:
            ValueError: none holds it.
        """
        for bucket in (num_tokens == num_rows and self._decode) or self._mixed:
            if bucket.num_tokens >= num_tokens and bucket.num_rows >= num_rows:
                return bucket
        raise ValueError(f"no bucket holds {num_tokens} tokens of {num_rows} rows")


def _ladder(first: int, last: int, *finer: tuple[int, int]) -> tuple[int, ...]:
    """Powers of two from `first`, and `last`; (start, n) puts n rungs between each two of them from `start` on."""
    rungs = {last}
    rung = first
    while rung < last:
        between = next((n for start, n in reversed(finer) if rung >= start), 0)
        rungs |= {rung + rung * i // (between + 1) for i in range(between + 1)}
        rung *= 2
    return tuple(sorted(r for r in rungs if r <= last))
