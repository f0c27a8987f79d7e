"""Products of a step's activations with weights that are kept as [N, K]."""

from jaxserve.pallas_kernels.matmul.api import matmul as matmul
