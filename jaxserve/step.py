"""What a step yields: the plain types between the runner, which collects it, and the scheduler, which takes it."""

from dataclasses import dataclass

import numpy as np


@dataclass(slots=True)
class StepLogprobs:
    """Log probabilities (nats) of a step; rows as in StepResult, N the most tokens that may be asked for.

    Attributes:
        raw, processed: float32 [R, 1+K], of the chosen tokens.
        top_ids: int32 [R, 1+K, N], most likely first.
        top_raw, top_processed: float32 [R, 1+K, N].
    """

    raw: np.ndarray
    processed: np.ndarray
    top_ids: np.ndarray
    top_raw: np.ndarray
    top_processed: np.ndarray


@dataclass(slots=True)
class ScoredTokens:
    """Log probabilities (nats) of prompt tokens that a step computed the logits of: S of them, in the order of its rows.

    Attributes:
        raw: float32 [S].
        ranks: int32 [S], how many tokens of the vocabulary are at least as likely, itself included where no other is.
        top_ids: int32 [S, N], most likely first.
        top_raw: float32 [S, N].
    """

    raw: np.ndarray
    ranks: np.ndarray
    top_ids: np.ndarray
    top_raw: np.ndarray


@dataclass(slots=True)
class StepResult:
    """What a step sampled, as collected from the device. Rows beyond those of the batch are padding.

    Attributes:
        token_ids: int32 [R, 1+K].
        counts: int32 [R], how many of them are valid; at least 1 where the row samples.
        logprobs: None where no row asked.
        scored: None where no row asked for those of its prompt.
    """

    token_ids: np.ndarray
    counts: np.ndarray
    logprobs: StepLogprobs | None = None
    scored: ScoredTokens | None = None
