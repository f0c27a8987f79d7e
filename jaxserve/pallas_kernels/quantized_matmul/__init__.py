"""Products of a step's activations with weights of 4 or 8 bits, which stay as they are in the device's memory."""

from jaxserve.pallas_kernels.quantized_matmul.api import quantized_matmul as quantized_matmul
from jaxserve.pallas_kernels.quantized_matmul.weights import EightBitWeight as EightBitWeight
from jaxserve.pallas_kernels.quantized_matmul.weights import FourBitWeight as FourBitWeight
from jaxserve.pallas_kernels.quantized_matmul.weights import pack_four_bit as pack_four_bit
