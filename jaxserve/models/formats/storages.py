"""The storages by the name that schemes call them."""

from jaxserve.models.formats.awq import AWQStorage
from jaxserve.models.formats.bitsandbytes import BitsAndBytesInt8Storage, BitsAndBytesStorage
from jaxserve.models.formats.compressed_tensors import Int8Storage, PackedStorage
from jaxserve.models.formats.fp8 import FP8Storage
from jaxserve.models.formats.gguf import GGUFStorage
from jaxserve.models.formats.gptq import GPTQStorage
from jaxserve.models.formats.mxfp4 import MXFP4Storage
from jaxserve.models.formats.scheme import Storage

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
