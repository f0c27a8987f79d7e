"""Requests alone and under load: where their tokens part, and how far their log probabilities are before that.

Without --deterministic a batch's shape decides the last bits of a logit. So tokens may part, but only where the request alone was nearly
undecided between two, and log probabilities of the tokens before may differ but little. With it no bit may differ.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from jaxserve.engine import Engine
from jaxserve.request import FinishReason, Request, SamplingParams, TokenLogprobs

MAX_MARGIN, MAX_LOGPROB_ERROR = 0.05, 0.03  # nats


@dataclass
class Answer:
    """A request's output tokens and their log probabilities, the two most likely tokens among them."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)


@dataclass(frozen=True)
class Parting:
    """Two answers to one request.

    Attributes:
        at: the first token that differs; None where all are equal.
        margin: nats between the two most likely tokens there, of the request alone; 0 where they do not part.
        logprob_error: largest difference of a chosen token's log probability before that.
    """

    at: int | None
    margin: float
    logprob_error: float

    @property
    def within(self) -> bool:
        """Whether it is within the bounds; NaN never is."""
        return self.margin <= MAX_MARGIN and self.logprob_error <= MAX_LOGPROB_ERROR


def compare(alone: Answer, loaded: Answer) -> Parting:
    """Where the answers part."""
    pairs = enumerate(zip(alone.token_ids, loaded.token_ids, strict=True))
    at = next((i for i, (one, other) in pairs if one != other), None)
    common = zip(alone.logprobs[:at], loaded.logprobs[:at], strict=True)
    # numpy's maximum lets no NaN be passed over.
    error = float(np.max([0.0, *(abs(one.raw - other.raw) for one, other in common)]))
    if at is None:
        return Parting(None, 0.0, error)
    first, second = alone.logprobs[at].top_raw[:2]
    return Parting(at, first - second, error)


def first_difference(one: Answer, other: Answer) -> str:
    """Where two answers first differ in a bit, and in what; "" where they do not."""
    for i, (first, second) in enumerate(zip(one.logprobs, other.logprobs, strict=True)):
        if one.token_ids[i] != other.token_ids[i]:
            return f"output token {i}: {one.token_ids[i]} and {other.token_ids[i]}"
        names = [
            name for name in ("raw", "processed", "top_token_ids", "top_raw", "top_processed") if _bits(first, name) != _bits(second, name)
        ]
        if names:
            return f"output token {i}: " + ", ".join(f"{name} {getattr(first, name)} and {getattr(second, name)}" for name in names)
    return ""


def _bits(logprobs: TokenLogprobs, name: str) -> bytes:
    return np.asarray(getattr(logprobs, name)).tobytes()


def answers(engine: Engine, requests: list[Request]) -> dict[str, Answer]:
    """Run requests at once; what they answered, by request id."""
    found = {request.request_id: Answer() for request in requests}
    for request in requests:
        engine.add_request(request)
    while engine.has_work:
        for output in engine.step():
            if output.finish_reason is FinishReason.ERROR:
                raise RuntimeError(output.error)
            found[output.request_id].token_ids += output.token_ids
            found[output.request_id].logprobs += output.logprobs
    return found


def check_under_load(
    engine: Engine,
    count: int,
    longest: int,
    output_tokens: int,
    noise: int,
    say: Callable[[str], None] = print,
    bitwise: bool = False,
    seed: int = 0,
) -> bool:
    """Run `count` greedy requests alone, then at once, twice in other orders, among `noise` sampled ones of any length.

    Args:
        longest: prompt tokens.
        output_tokens: of each greedy request; the others have up to twice as many.
        bitwise: tokens and log probabilities must be equal.

    Returns:
        whether every parting is within the bounds.
    """
    rng = np.random.default_rng(seed)

    def request(name: str, params: SamplingParams) -> Request:
        length = int(np.exp(rng.uniform(0, np.log(longest))))
        return Request(name, tuple(rng.integers(3, min(49000, engine.info.vocab_size), length).tolist()), params)

    params = SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True, logprobs=2)
    requests = [request(f"checked-{i}", params) for i in range(count)]
    alone = {r.request_id: answers(engine, [r])[r.request_id] for r in requests}
    if len({token for answer in alone.values() for token in answer.token_ids}) < 2:
        raise RuntimeError("constant logits: the run is void")
    good = True
    for run in range(2):
        others = []
        for i in range(noise):
            options = SamplingParams(temperature=1.0, max_tokens=int(rng.integers(1, 2 * output_tokens)), ignore_eos=True, seed=i)
            others.append(request(f"noise-{run}-{i}", options))
        order = rng.permutation(count + noise)
        loaded = answers(engine, [[*requests, *others][i] for i in order])
        partings = [compare(alone[r.request_id], loaded[r.request_id]) for r in requests]
        parted = [parting for parting in partings if parting.at is not None]
        say(
            f"under load, run {run + 1}: {len(parted)} of {count} answers part, widest margin {max(p.margin for p in partings):.4f} nats; "
            f"log probabilities before differ by at most {max(p.logprob_error for p in partings):.4f}"
        )
        good &= all(parting.within for parting in partings)
        if bitwise:
            differences = [(r, found) for r in requests if (found := first_difference(alone[r.request_id], loaded[r.request_id]))]
            say(f"under load, run {run + 1}: {len(differences)} of {count} answers differ in a bit")
            for r, found in differences[:3]:
                say(f"  {r.request_id}, {len(r.prompt_token_ids)} prompt tokens: {found}")
            good &= not differences
    return good
