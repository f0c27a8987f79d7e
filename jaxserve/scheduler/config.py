"""What a Scheduler is told once: limits, and the memory of each KV group."""

from collections.abc import Callable
from dataclasses import dataclass, field

from jaxserve.errors import StartupError


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits of a batch and of a request.

    Attributes:
        max_batch_size: slots: samples that run at once.
        max_batch_tokens: most tokens a step computes, speculated ones not counted.
        page_size: tokens a KV page, the same in every group.
        max_total_tokens: most prompt plus output tokens of a sample.
        prefix_caching: share the pages of equal prefixes.
        eos_token_ids: the model's end-of-sequence tokens.
        max_prefill_tokens_while_decoding: most prompt tokens a step computes beside running decodes, which bounds the gap that their
            streams see: a number, or a function called once a step. None is no bound but max_batch_tokens.
        step_sizes: token counts that cost what they hold, ascending; a step between two of them costs as much as the larger.
        max_scored_tokens: most tokens of a step that scores some of a prompt; None is no bound but max_batch_tokens.
        num_speculative_tokens: K: a step yields up to 1 + K tokens a sample; pages are reserved for all of them.

    Raises:
        StartupError: where a full batch of decodes does not fit the token budget.
    """

    max_batch_size: int
    max_batch_tokens: int
    page_size: int
    max_total_tokens: int
    prefix_caching: bool = True
    eos_token_ids: frozenset[int] = field(default_factory=frozenset)
    max_prefill_tokens_while_decoding: Callable[[], int] | int | None = None
    step_sizes: tuple[int, ...] = ()
    max_scored_tokens: int | None = None
    num_speculative_tokens: int = 0

    def __post_init__(self) -> None:
        """Check that every running sample can have its tokens in every step."""
        least = min(self.max_batch_tokens, self.max_scored_tokens or self.max_batch_tokens)
        if least < self.max_batch_size:
            raise StartupError(f"a step's token budget ({least}) must hold one token of each running request ({self.max_batch_size})")


@dataclass(frozen=True, slots=True)
class KVGroupPages:
    """The memory of one KV group.

    Attributes:
        num_pages: pages there are.
        window: how many positions a token sees, itself included; None for all.
    """

    num_pages: int
    window: int | None = None
