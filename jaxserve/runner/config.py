"""What a ModelRunner is told once."""

from dataclasses import dataclass
from typing import Self

from jaxserve.config import EngineOptions

GIB = 2**30
# On a GPU. Of more, a token is no cheaper; but decodes wait for the step, and attention's partial results take memory.
_MOST_DETERMINISTIC_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class RunnerConfig:
    """Sizes, memory and forms of the programs.

    Attributes:
        max_batch_size: slots: samples that run at once.
        max_batch_tokens: most tokens a step computes.
        page_size: tokens a KV page.
        max_total_tokens: most tokens of a request; None: what the model and the cache hold.
        kv_dtype: of keys and values in the cache, as JAX calls it; None: `attention_dtype` of the activations.
        kv_bytes: memory for the KV cache on each device; None: what the device has left.
        masked: compile what constrained requests need.
        deterministic: what a request gets is the same to the bit alone and in any batch.
        common_tokens: tokens of every deterministic step, where steps of several sizes would give a token other bits.
        peer_memory: where the devices can read each other's memory, kernels add up over it.
        compilation_cache_dir: folder of compiled programs that outlives the process; None: none.
    """

    max_batch_size: int
    max_batch_tokens: int
    page_size: int = 16
    max_total_tokens: int | None = None
    kv_dtype: str | None = None
    kv_bytes: int | None = None
    masked: bool = False
    deterministic: bool = False
    common_tokens: int | None = None
    peer_memory: bool = True
    compilation_cache_dir: str | None = None

    @classmethod
    def from_options(cls, options: EngineOptions, platform: str, compilation_cache_dir: str | None = None) -> Self:
        """Fill in what depends on the platform ("cpu" or "gpu")."""
        on_cpu = platform == "cpu"
        batch_size = options.max_batch_size or (32 if on_cpu else 256)
        batch_tokens = options.max_batch_prefill_tokens or (512 if on_cpu else 8192)
        common_tokens = None
        if options.deterministic:
            common_tokens = max(options.max_batch_prefill_tokens or _common_tokens(batch_size, on_cpu), batch_size)
            batch_tokens = common_tokens if on_cpu or options.max_batch_prefill_tokens else max(common_tokens, _MOST_DETERMINISTIC_TOKENS)
        return cls(
            max_batch_size=batch_size,
            max_batch_tokens=max(batch_tokens, batch_size),
            page_size=options.page_size,
            max_total_tokens=options.max_total_tokens,
            kv_dtype=options.kv_dtype,
            masked=not options.disable_grammar_support,
            deterministic=options.deterministic,
            common_tokens=common_tokens,
            peer_memory=not options.disable_custom_all_reduce,
            kv_bytes=int(options.cpu_kv_cache_gib * GIB) // options.tensor_size if on_cpu else None,
            compilation_cache_dir=compilation_cache_dir,
        )


def _common_tokens(batch_size: int, on_cpu: bool) -> int:
    """Tokens of every step: all decodes and some of a prompt. Of tokens that a step lacks the products are computed nevertheless."""
    tokens = batch_size + (32 if on_cpu else 256)
    return -(-tokens // 64) * 64  # whole tiles of a GPU's products
