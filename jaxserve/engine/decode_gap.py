"""DecodeGap: how many prompt tokens a step may carry while other requests wait for their next token."""

SMALLEST_CHUNK = 16
# Steps with fewer tokens are bound by the weights, not by their tokens, and say nothing of a token's cost.
SMALLEST_OBSERVED = 32
FORGETTING = 0.2


class DecodeGap:
    """Bounds the gap that a running stream sees while prompts are computed.

    A step's time is taken as a line through a decode step's time and the measured times of larger steps; the bound is where that line
    meets the wanted gap. Until a larger step was measured, chunks stay small.

    Args:
        max_gap: seconds that a running stream may wait for a token.
        first_chunk: prompt tokens a step before anything was measured.
    """

    def __init__(self, max_gap: float, first_chunk: int = 64):
        self._max_gap = max_gap
        self._first_chunk = first_chunk
        self._decode_seconds: float | None = None
        self._seconds_per_token: float | None = None

    def observe(self, num_tokens: int, seconds: float) -> None:
        """Learn from a finished step.

        Args:
            num_tokens: tokens it computed.
            seconds: what it took, without waiting for the step before.
        """
        if num_tokens < SMALLEST_OBSERVED:
            self._decode_seconds = _blend(self._decode_seconds, seconds)
        else:
            base = self._decode_seconds or 0.0
            self._seconds_per_token = _blend(self._seconds_per_token, max(seconds - base, 0.0) / num_tokens)

    def max_prefill_tokens(self) -> int:
        """Prompt tokens that the next step may carry beside running streams, at least SMALLEST_CHUNK."""
        if not self._seconds_per_token:
            return self._first_chunk
        left = self._max_gap - (self._decode_seconds or 0.0)
        return max(SMALLEST_CHUNK, int(left / self._seconds_per_token))


def _blend(old: float | None, new: float) -> float:
    return new if old is None else old + FORGETTING * (new - old)
