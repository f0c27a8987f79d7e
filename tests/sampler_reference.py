"""The sampler once more in plain numpy, float64, with sorts: what tests/test_sampler*.py hold the device's against."""

from collections.abc import Sequence

import numpy as np

from jaxserve.request import SamplingParams


def adjusted_logits(
    logits: np.ndarray, params: SamplingParams, prompt: Sequence[int] = (), output: Sequence[int] = (), banned: Sequence[int] = ()
) -> np.ndarray:
    """Bias, bans, then penalties: repetition over prompt and output, frequency and presence over the output.

    Args:
        logits: [V].
        params: their bias and penalties.
        prompt, output: tokens so far.
        banned: forbidden while there are fewer than min_tokens.

    Returns:
        float64 [V].
    """
    adjusted = logits.astype(np.float64)
    for token, bias in params.logit_bias.items():
        adjusted[token] += bias
    if len(output) < params.min_tokens:
        adjusted[list(banned)] = -np.inf
    for token in {*prompt, *output}:
        value = adjusted[token]
        adjusted[token] = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
    for token in set(output):
        adjusted[token] -= params.frequency_penalty * list(output).count(token) + params.presence_penalty
    return adjusted


def probabilities(adjusted: np.ndarray, params: SamplingParams) -> np.ndarray:
    """What is sampled: float64 [V], 0 for dropped tokens. A greedy row's is at temperature 1 and whole."""
    if params.greedy:
        return _softmax(adjusted)
    p = _softmax(adjusted / params.temperature)
    p = np.where(p >= params.min_p * p.max(), p, 0)
    if params.top_k:
        p = np.where(p >= np.sort(p)[-min(params.top_k, len(p))], p, 0)
    if params.top_p < 1:
        p = _cover(p, -p, params.top_p)
    if params.typical_p < 1:
        p /= p.sum()
        information = -np.log(np.where(p > 0, p, 1))
        entropy = (p * information).sum()
        p = _cover(p, np.where(p > 0, np.abs(information - entropy), np.inf), params.typical_p)
    return p / p.sum()


def _cover(p: np.ndarray, key: np.ndarray, share: float) -> np.ndarray:
    """Keep the tokens of smallest key that make up the share; tokens whose key equals the last one's too (up to rounding)."""
    order = np.argsort(key, kind="stable")
    last = np.searchsorted(np.cumsum(p[order]), share * p.sum())
    return np.where(key <= key[order[min(last, len(p) - 1)]] + 1e-12, p, 0)


def _softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """float64 [V]."""
    shifted = logits.astype(np.float64) - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def noise(seed: int, position: int, vocab_size: int) -> np.ndarray:
    """Exponential noise, float64 [V]: Threefry-2x32-20 keys a row, triple32 hashes its tokens."""
    mask = 0xFFFFFFFF
    low, high = seed & mask, seed >> 32
    keys = [low, high, low ^ high ^ 0x1BD11BDA]
    x, y = (position + low) & mask, high
    for i in range(20):
        turn = (13, 15, 26, 6, 17, 29, 16, 24)[i % 8]
        x = (x + y) & mask
        y = x ^ ((y << turn | y >> (32 - turn)) & mask)
        if i % 4 == 3:
            j = i // 4 + 1
            x, y = (x + keys[j % 3]) & mask, (y + keys[(j + 1) % 3] + j) & mask
    word = (np.arange(vocab_size, dtype=np.uint64) + x) & mask
    word = ((word ^ word >> 17) * 0xED5AD4BB) & mask
    word = word ^ y
    word = ((word ^ word >> 11) * 0xAC4C1B51) & mask
    word = ((word ^ word >> 15) * 0x31848BAB) & mask
    word = word ^ word >> 14
    return -np.log1p(-(word.astype(np.float64) + 0.5) / 2**32)
