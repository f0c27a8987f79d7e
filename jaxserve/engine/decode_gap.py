"""DecodeGap: how many prompt tokens a step may carry while other requests wait for their next token."""

SMALLEST_CHUNK = 16
# Steps with fewer tokens are bound by the weights, not by their tokens, and say nothing of a token's cost.
SMALLEST_OBSERVED = 32
FORGETTING = 0.2
# A prompt's next chunk costs a little more than the one before: it looks back on more tokens.
SHARE = 0.82


class DecodeGap:
    """Bounds the gap that a running stream sees while prompts are computed.

    A step's time is taken as a line through a decode step's time and the measured times of larger steps; the bound is where that line
    meets the wanted gap, or a little earlier. A token's cost rises at once with what is measured and falls slowly, since too long a gap
    is seen and too small a chunk is not. The tokens of a small step seem cheap: the weights are read for them as for one. So no
    step may carry more than twice the tokens of the largest that was measured.

    Args:
        max_gap: seconds that a running stream may wait for a token.
        first_chunk: prompt tokens a step before anything was measured.
    """

    def __init__(self, max_gap: float, first_chunk: int = 64):
        self._max_gap = max_gap
        self._decode_seconds = 0.0
        self._seconds_per_token = 0.0
        self._largest = first_chunk // 2  # tokens of a step

    def observe(self, num_tokens: int, seconds: float) -> None:
        """Learn from a finished step.

        Args:
            num_tokens: tokens it computed.
            seconds: what it took, without waiting for the step before.
        """
        if num_tokens < SMALLEST_OBSERVED:
            self._decode_seconds = _blend(self._decode_seconds, seconds) if self._decode_seconds else seconds
            return
        per_token = max(seconds - self._decode_seconds, 0.0) / num_tokens
        self._seconds_per_token = max(per_token, _blend(self._seconds_per_token, per_token))
        self._largest = max(self._largest, num_tokens)

    def max_prefill_tokens(self) -> int:
        """Prompt tokens that the next step may carry beside running streams, at least SMALLEST_CHUNK."""
        most = 2 * self._largest
        if self._seconds_per_token:
            left = SHARE * self._max_gap - self._decode_seconds
            most = min(most, int(left / self._seconds_per_token))
        return max(SMALLEST_CHUNK, most)


def _blend(old: float, new: float) -> float:
    return old + FORGETTING * (new - old)
