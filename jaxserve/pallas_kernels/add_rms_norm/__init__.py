"""Residual addition and root mean square norm in one: api, reference, one file an implementation."""

from jaxserve.pallas_kernels.add_rms_norm.api import MOST_KERNEL_NORM_TOKENS as MOST_KERNEL_NORM_TOKENS
from jaxserve.pallas_kernels.add_rms_norm.api import add_rms_norm as add_rms_norm
from jaxserve.pallas_kernels.add_rms_norm.reference import add_branch as add_branch
