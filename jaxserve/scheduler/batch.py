"""What one step computes."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from jaxserve.scheduler.sample import Sample

# Token ids of a decode row whose token is not on the host yet: the device has it, at the sample's slot.
IN_FLIGHT = (-1,)


@dataclass(slots=True)
class ScheduledRow:
    """One sample's share of a step.

    Attributes:
        sample: whose; its page tables are those of this step until the next `Scheduler.schedule`.
        start: position of the first token, = num_computed_tokens before the step.
        num_tokens: how many tokens are computed.
        token_ids: those tokens; -1 for one that the step in flight samples (it is on the device, at the slot).
        samples: the last token's logits are sampled: the row catches up with all its sample's tokens.
        new_slot: the sample enters its slot with this step, for the first time or after preemption.
        num_output_tokens: output tokens before the one that this row samples, also those still in flight.
        num_scored: of so many of its tokens, from the first on, the log probability of the prompt's next token is wanted.
    """

    sample: Sample
    start: int
    num_tokens: int
    token_ids: Sequence[int]
    samples: bool
    new_slot: bool
    num_output_tokens: int
    num_scored: int = 0


@dataclass(slots=True)
class ScheduledBatch:
    """One step.

    Attributes:
        rows: rows of one token first (decodes), then prefill chunks; at most one a sample.
        page_copies: (KV group, source page, target page), to be done before the step and after the steps before it.
        num_tokens: sum over rows.
        constrained: a row's token must obey a grammar, so that its mask is needed before it is sampled.
        num_scored: sum over rows.
    """

    rows: list[ScheduledRow]
    page_copies: list[tuple[int, int, int]] = field(default_factory=list)
    num_tokens: int = 0
    constrained: bool = False
    num_scored: int = 0
