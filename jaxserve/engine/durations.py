"""Durations: how long something took, each time, in fixed buckets."""

from bisect import bisect_left

from jaxserve.request import STEP_TIME_BOUNDS


class Durations:
    """Counts and sums seconds; half a microsecond each, nothing allocated.

    Attributes:
        seconds: the sum.
        counts: of those up to each of STEP_TIME_BOUNDS and above the one before it; the last entry those above all.
    """

    __slots__ = ("counts", "seconds")

    def __init__(self) -> None:
        self.seconds = 0.0
        self.counts = [0] * (len(STEP_TIME_BOUNDS) + 1)

    def observe(self, seconds: float) -> None:
        """Count one."""
        self.seconds += seconds
        self.counts[bisect_left(STEP_TIME_BOUNDS, seconds)] += 1
