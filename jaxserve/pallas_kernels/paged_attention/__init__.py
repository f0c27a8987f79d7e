"""Attention over a paged KV cache: api, reference, one file an implementation."""

from jaxserve.pallas_kernels.paged_attention.api import check_implementation as check_implementation
from jaxserve.pallas_kernels.paged_attention.api import paged_attention as paged_attention
from jaxserve.pallas_kernels.paged_attention.api import plan_attention as plan_attention
