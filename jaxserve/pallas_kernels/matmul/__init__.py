"""Products of a step's activations with weights that are kept as [N, K]."""

from jaxserve.pallas_kernels.matmul.api import add_matmul as add_matmul
from jaxserve.pallas_kernels.matmul.api import add_parts as add_parts
from jaxserve.pallas_kernels.matmul.api import gated_matmul as gated_matmul
from jaxserve.pallas_kernels.matmul.api import matmul as matmul
from jaxserve.pallas_kernels.matmul.api import matmul_parts as matmul_parts
from jaxserve.pallas_kernels.matmul.api import multiply_gated as multiply_gated
from jaxserve.pallas_kernels.matmul.api import takes_fixed_order as takes_fixed_order
