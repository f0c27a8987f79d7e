"""From what a step sampled to what a client is told."""

from jaxserve.request import FinishReason, TokenLogprobs, TokenOutput
from jaxserve.scheduler.sample import Sample
from jaxserve.step import StepLogprobs


def receive(
    sample: Sample, token_ids: list[int], eos_token_ids: frozenset[int], logprobs: StepLogprobs | None = None, row: int = 0
) -> TokenOutput:
    """Append sampled tokens to a sample, up to its end.

    Args:
        sample: unfinished.
        token_ids: what a step sampled for it, in order.
        eos_token_ids: the model's.
        logprobs: of the step, told where the request asked for them.
        row: of the sample in the step.

    Returns:
        the tokens that count, the one that ends the sample included, and why it ends if it does.
    """
    reason = None
    if len(sample.token_ids) + len(token_ids) < sample.max_num_tokens and sample.stop_token_ids.isdisjoint(token_ids):
        sample.token_ids += token_ids
    else:
        token_ids, reason = _append_to_end(sample, token_ids, eos_token_ids)
    count = len(token_ids)
    if count > 1:  # schedule() counted one
        sample.num_tokens += count - 1
        sample.num_computed_tokens += count - 1
        sample.num_settled_tokens += count - 1
    told = [] if logprobs is None else _token_logprobs(logprobs, row, count, sample.params.logprobs)
    return TokenOutput(sample.request.request_id, sample.index, token_ids, told, reason, sample.num_cached_tokens, sample.queue_time)


def error_output(sample: Sample, message: str) -> TokenOutput:
    """Return the last output of a sample whose step failed."""
    return TokenOutput(
        sample.request.request_id, sample.index, [], [], FinishReason.ERROR, sample.num_cached_tokens, max(0.0, sample.queue_time), message
    )


def _append_to_end(sample: Sample, token_ids: list[int], eos_token_ids: frozenset[int]) -> tuple[list[int], FinishReason | None]:
    for i, token in enumerate(token_ids):
        num_output_tokens = len(sample.token_ids) - sample.num_prompt_tokens
        sample.token_ids.append(token)
        # A stop is told before the length: the text is complete.
        if token in sample.stop_token_ids and num_output_tokens >= sample.params.min_tokens:
            is_eos = token in eos_token_ids and not sample.params.ignore_eos
            return token_ids[: i + 1], FinishReason.EOS if is_eos else FinishReason.STOP
        if len(sample.token_ids) == sample.max_num_tokens:
            return token_ids[: i + 1], FinishReason.LENGTH
    return token_ids, None


def _token_logprobs(logprobs: StepLogprobs, row: int, count: int, num_top: int | None) -> list[TokenLogprobs]:
    """Return the log probabilities of a row's first `count` tokens, each with its `num_top` most likely ones; none where it is None."""
    if num_top is None:
        return []
    return [
        TokenLogprobs(
            float(logprobs.raw[row, i]),
            float(logprobs.processed[row, i]),
            logprobs.top_ids[row, i, :num_top].tolist(),
            logprobs.top_raw[row, i, :num_top].tolist(),
            logprobs.top_processed[row, i, :num_top].tolist(),
        )
        for i in range(count)
    ]
