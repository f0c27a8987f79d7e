"""Detects the watermark of `watermark: true` in a text's tokens (Kirchenbauer et al. 2023, arXiv 2301.10226).

    python -c "from jaxserve.watermark import z_score; ..."

The green list after a token is a keyed hash of token ids (pallas_kernels/noise.py), here once more in numpy: a detector needs no JAX.
"""

import math
from collections.abc import Sequence

import numpy as np

_KEY = 15485863
_WORD = np.uint64(0xFFFFFFFF)


def green(previous: Sequence[int], token_ids: Sequence[int], gamma: float) -> np.ndarray:
    """Whether each token is on the green list of the one before it.

    Args:
        previous, token_ids: [N], pairs of tokens that follow each other.
        gamma: share of the vocabulary that is green.

    Returns:
        bool [N].
    """
    key = np.array(previous, np.uint64) * np.uint64(_KEY) & _WORD
    word = np.array(token_ids, np.uint64) + key & _WORD
    word = (word ^ word >> np.uint64(17)) * np.uint64(0xED5AD4BB) & _WORD
    word ^= np.uint64(_KEY)
    word = (word ^ word >> np.uint64(11)) * np.uint64(0xAC4C1B51) & _WORD
    word = (word ^ word >> np.uint64(15)) * np.uint64(0x31848BAB) & _WORD
    word ^= word >> np.uint64(14)
    return (word + 0.5) * 2.0**-32 < gamma


def z_score(token_ids: Sequence[int], gamma: float = 0.5) -> float:
    """By how many standard deviations the green tokens of a text exceed what is expected without a watermark.

    Args:
        token_ids: at least two, the prompt's last token first.
        gamma: as the server's --watermark-gamma; between 0 and 1.
    """
    count = len(token_ids) - 1
    return float(green(token_ids[:-1], token_ids[1:], gamma).sum() - gamma * count) / math.sqrt(count * gamma * (1 - gamma))
