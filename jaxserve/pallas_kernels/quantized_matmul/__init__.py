"""Products of a step's activations with weights of 4 or 8 bits, which stay as they are in the device's memory."""

from jaxserve.pallas_kernels.quantized_matmul.api import quantized_add_matmul as quantized_add_matmul
from jaxserve.pallas_kernels.quantized_matmul.api import quantized_gated_matmul as quantized_gated_matmul
from jaxserve.pallas_kernels.quantized_matmul.api import quantized_matmul as quantized_matmul
from jaxserve.pallas_kernels.quantized_matmul.api import quantized_matmul_parts as quantized_matmul_parts
from jaxserve.pallas_kernels.quantized_matmul.forms import pack as pack
from jaxserve.pallas_kernels.quantized_matmul.forms import packed_shapes as packed_shapes
from jaxserve.pallas_kernels.quantized_matmul.forms import weight_of as weight_of
from jaxserve.pallas_kernels.quantized_matmul.layout import TABLES as TABLES
from jaxserve.pallas_kernels.quantized_matmul.layout import Layout as Layout
from jaxserve.pallas_kernels.quantized_matmul.layout import ScaleDtype as ScaleDtype
from jaxserve.pallas_kernels.quantized_matmul.weights import EightBitWeight as EightBitWeight
from jaxserve.pallas_kernels.quantized_matmul.weights import FourBitWeight as FourBitWeight
from jaxserve.pallas_kernels.quantized_matmul.weights import pack_four_bit as pack_four_bit
