"""The choice of one token a row of logits, on NVIDIA GPUs from sm_80 on."""

from jaxserve.pallas_kernels.token_choice.api import TokenChoice, TokenRange, choose_adjusted_tokens, choose_tokens

__all__ = ["TokenChoice", "TokenRange", "choose_adjusted_tokens", "choose_tokens"]
