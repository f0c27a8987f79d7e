"""One continuation of a request's prompt, as the scheduler follows it."""

import enum
from array import array

from jaxserve.request import Request, SamplingParams


class SampleState(enum.Enum):
    """Where a sample is in its life."""

    WAITING = "waiting"  # holds no slot; after preemption it may hold pages until its last step is collected
    RUNNING = "running"  # holds a slot and pages
    FINISHED = "finished"  # yields no further output; holds slot and pages until its last step is collected


class Sample:
    """One of a request's n continuations.

    Compared and hashed by identity. Counters count tokens from the start of the prompt:

        0 ... num_computed_tokens ... len(token_ids) ... num_tokens ... max_num_tokens
              K/V is dispatched       ids are known      sampled,       the end, known
              up to here              on the host        maybe unknown  by count

    Attributes:
        request, params, index: what is continued, how, and which of its n samples this is.
        constrained: its tokens must obey a grammar.
        ready: may be scheduled (its grammar is compiled).
        slot: row of the running batch on the device, -1 while it has none.
        page_tables: for each KV group the page ids in logical order, equally long; a page that was freed behind the window is 0.
        token_ids: prompt, then the output tokens that are known.
        num_cached_tokens: prompt tokens taken from the prefix cache when the request was first scheduled.
    """

    __slots__ = (
        "arrived_at",
        "constrained",
        "index",
        "max_num_tokens",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_freed_pages",
        "num_in_flight",
        "num_passed",
        "num_prompt_tokens",
        "num_stored_pages",
        "num_tokens",
        "order",
        "page_keys",
        "page_tables",
        "params",
        "prompt_step",
        "queue_time",
        "ready",
        "request",
        "room",
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
        self.constrained = False
        # Grows
        self.state = SampleState.WAITING
        self.ready = True
        self.token_ids: list[int] = list(request.prompt_token_ids)
        self.num_tokens = self.num_prompt_tokens
        self.page_keys: list[bytes] = []
        self.num_passed = 0
        self.num_cached_tokens = 0
        self.queue_time = -1.0
        # From admission to release
        self.slot = -1
        self.page_tables: list[array[int]] = []
        self.num_freed_pages: list[int] = []
        self.num_stored_pages = 0
        self.num_computed_tokens = 0
        self.room = 0
        self.settle_at = 0
        self.prompt_step = -1
        # From schedule to update
        self.num_in_flight = 0
