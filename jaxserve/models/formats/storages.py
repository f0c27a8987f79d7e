"""The storages by the name that schemes call them."""

from jaxserve.models.formats.awq import AWQStorage
from jaxserve.models.formats.gptq import GPTQStorage
from jaxserve.models.formats.scheme import Storage

STORAGES: dict[str, Storage] = {"awq": AWQStorage(), "gptq": GPTQStorage()}
