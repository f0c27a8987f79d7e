"""DecodeGap: chunks shrink so that a running stream waits no longer than asked."""

import pytest

from jaxserve.engine.decode_gap import SMALLEST_CHUNK, DecodeGap


def seconds(num_tokens: int, num_before: int) -> float:
    """A step of the 8B's shape on an H200, about: weights or arithmetic, and attention over what comes before."""
    return max(0.0043, num_tokens * 21e-6) + num_tokens * (num_before + num_tokens / 2) * 0.7e-9


def test_before_anything_is_measured_chunks_are_small():
    assert DecodeGap(0.5, first_chunk=64).max_prefill_tokens() == 64


@pytest.mark.parametrize("length", [8192, 32768])
@pytest.mark.parametrize("max_gap", [0.030, 0.060, 0.120])
def test_no_gap_is_longer_and_little_time_is_lost(length: int, max_gap: float):
    gap, gaps = DecodeGap(max_gap), []
    for _ in range(20):
        gap.observe(1, seconds(1, 0))
    for _ in range(8):  # prompts, with decode steps between them
        done = 0
        while done < length:
            chunk = min(gap.max_prefill_tokens(), length - done)
            gaps.append(seconds(1 + chunk, done))
            gap.observe(1 + chunk, gaps[-1])
            done += chunk
        gap.observe(1, seconds(1, 0))
    assert max(gaps) <= max_gap
    whole = sum(seconds(min(8192, length - done), done) for done in range(0, length, 8192))
    assert sum(gaps) < 1.15 * 8 * whole, "the weights are read once a chunk"


def test_a_bound_that_cannot_be_kept_still_makes_progress():
    gap = DecodeGap(0.001)
    for _ in range(50):
        gap.observe(1, 0.010)
        gap.observe(513, 0.200)
    assert gap.max_prefill_tokens() == SMALLEST_CHUNK


def test_it_recovers_from_a_step_that_something_else_held_up():
    gap = DecodeGap(0.060)
    for _ in range(50):
        gap.observe(1, 0.0043)
        gap.observe(1025, seconds(1025, 4096))
    before = gap.max_prefill_tokens()
    gap.observe(1025, 1.0)
    assert gap.max_prefill_tokens() < before / 10
    for _ in range(30):
        chunk = gap.max_prefill_tokens()
        gap.observe(1 + chunk, seconds(1 + chunk, 4096))
    assert gap.max_prefill_tokens() > 0.9 * before
