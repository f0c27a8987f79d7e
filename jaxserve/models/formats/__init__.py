"""How matrices are kept: dense, or quantized as a checkpoint has them or as the user asks.

`quantization` reads which; one file a kind of checkpoint says what it stores (`Storage`); `matrices` are the modules that hold the arrays.
"""

from jaxserve.models.formats.gguf import BLOCK_TYPES as BLOCK_TYPES
from jaxserve.models.formats.gguf import BLOCKS as BLOCKS
from jaxserve.models.formats.gguf import GGUFTypes as GGUFTypes
from jaxserve.models.formats.matrices import DenseFormat as DenseFormat
from jaxserve.models.formats.matrices import Format as Format
from jaxserve.models.formats.matrices import make_format as make_format
from jaxserve.models.formats.on_load import by_moments as by_moments
from jaxserve.models.formats.on_load import quantize as quantize
from jaxserve.models.formats.quantization import Quantization as Quantization
from jaxserve.models.formats.quantized_matrix import QuantizedMatrix as QuantizedMatrix
from jaxserve.models.formats.quantized_matrix import QuantizedPart as QuantizedPart
from jaxserve.models.formats.reading import read_quantization as read_quantization
