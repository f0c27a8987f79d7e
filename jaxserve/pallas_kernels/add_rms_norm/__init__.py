"""Residual addition and root mean square norm in one: api, reference, one file an implementation."""

from jaxserve.pallas_kernels.add_rms_norm.api import add_rms_norm as add_rms_norm
