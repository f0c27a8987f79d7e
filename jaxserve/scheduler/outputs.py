"""From what a step sampled to what a client is told."""

from jaxserve.request import FinishReason, TokenLogprobs, TokenOutput
from jaxserve.scheduler.batch import StepLogprobs
from jaxserve.scheduler.sample import Sample


def accept(sample: Sample, token_ids: list[int], eos_token_ids: frozenset[int]) -> tuple[list[int], FinishReason | None]:
    """Append sampled tokens to a sample, up to its end.

    Args:
        sample: unfinished.
        token_ids: what a step sampled for it, in order.
        eos_token_ids: the model's.

    Returns:
        the tokens that count, the one that ends the sample included, and why it ends, None if it goes on.
    """
    known = sample.token_ids
    if len(known) + len(token_ids) < sample.max_num_tokens and sample.stop_token_ids.isdisjoint(token_ids):
        known += token_ids
        return token_ids, None
    params = sample.params
    for i, token in enumerate(token_ids):
        num_output_tokens = len(known) - sample.num_prompt_tokens
        known.append(token)
        # A stop is told before the length: the text is complete.
        if token in sample.stop_token_ids and num_output_tokens >= params.min_tokens:
            is_eos = token in eos_token_ids and not params.ignore_eos
            return token_ids[: i + 1], FinishReason.EOS if is_eos else FinishReason.STOP
        if len(known) == sample.max_num_tokens:
            return token_ids[: i + 1], FinishReason.LENGTH
    return token_ids, None


def token_logprobs(logprobs: StepLogprobs, row: int, count: int, num_top: int | None) -> list[TokenLogprobs]:
    """Return the log probabilities of a row's first `count` tokens, each with its `num_top` most likely ones; none where that is None."""
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


def error_output(sample: Sample, message: str) -> TokenOutput:
    """Return the last output of a sample whose step failed."""
    return TokenOutput(
        sample.request.request_id, sample.index, [], [], FinishReason.ERROR, sample.num_cached_tokens, max(0.0, sample.queue_time), message
    )
