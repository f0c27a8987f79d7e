"""PromptScores: gathers the log probabilities of prompts that are computed in several steps."""

from collections.abc import Iterable

import numpy as np

from jaxserve.request import PromptLogprobs, Request, TokenOutput
from jaxserve.scheduler import ScheduledBatch
from jaxserve.step import ScoredTokens


class PromptScores:
    """The prompts that are being scored. One that is preempted on the way is scored again from its start."""

    def __init__(self) -> None:
        self._requests: dict[str, PromptLogprobs] = {}

    def add(self, request: Request) -> None:
        """Expect the scores of a request's prompt."""
        count, num_top = len(request.prompt_token_ids) - 1, request.params.prompt_logprobs
        assert num_top is not None
        self._requests[request.request_id] = PromptLogprobs(
            np.zeros(count, np.float32),
            np.zeros(count, np.int32),
            np.zeros((count, num_top), np.int32),
            np.zeros((count, num_top), np.float32),
        )

    def take(self, batch: ScheduledBatch, scored: ScoredTokens) -> None:
        """Keep what a step scored."""
        end = 0
        for row in batch.rows:
            begin, end = end, end + row.num_scored
            if not row.num_scored or (known := self._requests.get(row.sample.request.request_id)) is None:
                continue
            here = slice(row.start, row.start + row.num_scored)
            num_top = known.top_token_ids.shape[1]
            known.raw[here], known.ranks[here] = scored.raw[begin:end], scored.ranks[begin:end]
            known.top_token_ids[here], known.top_raw[here] = scored.top_ids[begin:end, :num_top], scored.top_raw[begin:end, :num_top]

    def tell(self, outputs: Iterable[TokenOutput]) -> None:
        """Put the scores of a prompt to the first output of its sample 0: the step that gave it computed the last of the prompt."""
        if not self._requests:
            return
        for output in outputs:
            if output.index == 0:
                output.prompt_logprobs = self._requests.pop(output.request_id, None)

    def forget(self, request_id: str) -> None:
        """A request, or its sample 0, is no longer wanted; unknown ids are ignored."""
        self._requests.pop(request_id, None)
