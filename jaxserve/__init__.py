"""jaxserve serves large language models on JAX/XLA, with the APIs of OpenAI and of Text Generation Inference."""

from typing import TYPE_CHECKING

from jaxserve.request import SamplingParams as SamplingParams

if TYPE_CHECKING:
    from jaxserve.llm import LLM as LLM
    from jaxserve.llm import RequestOutput as RequestOutput

__all__ = ["LLM", "RequestOutput", "SamplingParams"]


def __getattr__(name: str) -> object:
    """Import LLM, and JAX with it, only when asked for: the launcher and the HTTP processes run without JAX."""
    if name in ("LLM", "RequestOutput"):
        import jaxserve.llm

        return getattr(jaxserve.llm, name)
    raise AttributeError(f"module 'jaxserve' has no attribute '{name}'")
