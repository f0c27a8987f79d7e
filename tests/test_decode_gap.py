"""DecodeGap: chunks shrink so that a running stream waits no longer than asked."""

from jaxserve.engine.decode_gap import SMALLEST_CHUNK, DecodeGap


def test_chunks_stay_small_until_measured():
    assert DecodeGap(0.5, first_chunk=64).max_prefill_tokens() == 64


def test_bound_follows_the_measured_cost():
    gap = DecodeGap(0.060)
    for _ in range(50):
        gap.observe(8, 0.010)  # decode steps: 10 ms
        gap.observe(1000, 0.110)  # 0.1 ms a token on top
    assert 480 <= gap.max_prefill_tokens() <= 520  # 50 ms left


def test_a_gap_no_step_can_keep_still_makes_progress():
    gap = DecodeGap(0.001)
    gap.observe(8, 0.010)
    gap.observe(1000, 0.110)
    assert gap.max_prefill_tokens() == SMALLEST_CHUNK


def test_a_slower_device_lowers_the_bound():
    gap = DecodeGap(0.100)
    gap.observe(1000, 0.1)
    before = gap.max_prefill_tokens()
    for _ in range(20):
        gap.observe(1000, 0.4)
    assert gap.max_prefill_tokens() < before / 3
