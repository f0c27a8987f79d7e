"""One continuation of a request's prompt, as the scheduler follows it."""

import enum
import secrets
from array import array

from jaxserve.request import Request, SamplingParams

NEVER = -1  # a step that no sample is scheduled in


def sample_seed(seed: int | None, index: int) -> int:
    """64-bit seed of one of a request's n samples.

    Args:
        seed: the request's; None draws one.
        index: which sample; 0 takes the request's own seed, the others a hash of both (SplitMix64, Steele et al. 2014).
    """
    if seed is None:
        return secrets.randbits(64)
    if index == 0:
        return seed % 2**64
    mixed = (seed + index * 0x9E3779B97F4A7C15) % 2**64
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % 2**64
    return mixed ^ (mixed >> 31)


class SampleState(enum.Enum):
    """Where a sample is in its life."""

    WAITING = "waiting"  # to be admitted, for the first time or again after preemption
    RUNNING = "running"  # has a slot and pages
    FINISHED = "finished"  # yields no further output

    # A sample that was preempted or is finished keeps slot and pages until no step in flight holds them.


class Sample:
    """One of a request's n continuations; compared and hashed by identity.

    Counters count tokens from the start of the prompt. While a step is in flight they differ:

        0 ... num_settled_tokens ... num_computed_tokens ... num_tokens ... max_num_tokens
              K/V written by steps   K/V written by steps    prompt and     the end,
              that were collected    that were scheduled     all sampled    known by count

    Args:
        request, index: what is continued, and which of its n samples this is.
        order: place in the line of all samples that ever arrived.
        arrived_at: seconds, by the scheduler's clock.
        max_num_tokens: prompt and output tokens when it ends.
        stop_token_ids: tokens that end it, the model's among them.

    Attributes:
        seed: of its noise, of 64 bits; it keeps it when it is preempted.
        constrained: its tokens must obey a grammar.
        ready: may be scheduled (its grammar is compiled).
        scores_prompt: the log probabilities of its prompt are wanted, so that it takes no part of it from anywhere.
        slot: row of the running batch on the device, -1 while it has none.
        page_tables: for each KV group the page ids in logical order, equally long; a page freed behind the window is 0.
        token_ids: prompt, then the output tokens that are known on the host.
        num_cached_tokens: prompt tokens taken from the prefix cache when its request was first scheduled.
    """

    __slots__ = (
        "arrived_at",
        "constrained",
        "index",
        "lacking",
        "max_num_tokens",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_freed_pages",
        "num_in_flight",
        "num_passed",
        "num_prompt_tokens",
        "num_settled_tokens",
        "num_stored_pages",
        "num_tokens",
        "order",
        "page_keys",
        "page_tables",
        "params",
        "prompt_counted",
        "prompt_step",
        "queue_time",
        "ready",
        "request",
        "room",
        "scores_prompt",
        "seed",
        "settle_at",
        "slot",
        "state",
        "stop_token_ids",
        "token_ids",
    )

    def __init__(self, request: Request, index: int, order: int, arrived_at: float, max_num_tokens: int, stop_token_ids: frozenset[int]):
        # For life
        self.request = request
        self.params: SamplingParams = request.params
        self.index = index
        self.order = order
        self.arrived_at = arrived_at
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.max_num_tokens = max_num_tokens
        self.stop_token_ids = stop_token_ids
        self.seed = sample_seed(request.params.seed, index)
        self.constrained = False
        self.ready = True
        self.scores_prompt = request.params.prompt_logprobs is not None and index == 0
        # Grows until it is finished
        self.state = SampleState.WAITING
        self.token_ids: list[int] = list(request.prompt_token_ids)
        self.num_tokens = self.num_prompt_tokens
        self.page_keys: list[bytes] = []  # of its full pages, as far as they were wanted
        # While it waits
        self.num_passed = 0  # steps in which a later one was admitted before it
        self.lacking: tuple[int, int] | None = None  # (KV group, pages of it) last found lacking
        # Since its request was first scheduled
        self.prompt_counted = False
        self.num_cached_tokens = 0
        self.queue_time = -1.0
        # From admission to release
        self.slot = -1
        self.page_tables: list[array[int]] = []
        self.num_freed_pages: list[int] = []  # for each KV group, leading pages given back behind the window
        self.num_stored_pages = 0  # leading pages offered to the prefix cache
        self.num_settled_tokens = 0
        self.num_computed_tokens = 0
        self.room = 0  # a token may be computed while num_computed_tokens is below it
        self.settle_at = 0  # num_settled_tokens at which the next page is full
        self.prompt_step = NEVER  # the step that computes the last of the prompt
        # From schedule to update
        self.num_in_flight = 0  # steps

    @property
    def num_behind(self) -> int:
        """Tokens still to be computed: one where it has caught up, more in its prompt or after preemption."""
        return self.num_tokens - self.num_computed_tokens
