"""Logarithms of sums of exponentials, row by row: api, one file an implementation."""

from jaxserve.pallas_kernels.log_sum_exp.api import log_sum_exp as log_sum_exp
