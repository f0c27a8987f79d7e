"""The storages by the name that schemes call them."""

from collections.abc import Callable

from jaxserve.models.formats.awq import AWQStorage
from jaxserve.models.formats.bitsandbytes import BitsAndBytesInt8Storage, BitsAndBytesStorage, check_state, check_weight_format
from jaxserve.models.formats.compressed_tensors import Int8Storage, PackedStorage, check_int8, check_packed
from jaxserve.models.formats.fp8 import FP8Storage, check_scales
from jaxserve.models.formats.gguf import GGUFStorage
from jaxserve.models.formats.gptq import GPTQStorage
from jaxserve.models.formats.mxfp4 import MXFP4Storage
from jaxserve.models.formats.scheme import Scheme, Storage, Tensors

STORAGES: dict[str, Storage] = {
    "awq": AWQStorage(),
    "bitsandbytes": BitsAndBytesStorage(),
    "bitsandbytes-int8": BitsAndBytesInt8Storage(),
    "fp8": FP8Storage(),
    "gguf": GGUFStorage(),
    "gptq": GPTQStorage(),
    "int8": Int8Storage(),
    "mxfp4": MXFP4Storage(),
    "packed": PackedStorage(),
}

CHECKS: dict[str, Callable[[Scheme, Tensors, str, int, int], None]] = {
    "bitsandbytes": check_state,
    "bitsandbytes-int8": check_weight_format,
    "fp8": check_scales,
    "int8": check_int8,
    "packed": check_packed,
}
"""What must hold of the tensors of a module's matrix [n, k] beside their shapes and dtypes; WeightsError where it does not."""
