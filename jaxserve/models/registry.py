"""Which architectures are served."""

from jaxserve.errors import UnsupportedModel
from jaxserve.models.family import Family
from jaxserve.models.llama import LLAMA
from jaxserve.models.mistral import MISTRAL
from jaxserve.models.qwen2 import QWEN2
from jaxserve.models.qwen3 import QWEN3

FAMILIES: dict[str, Family] = {family.architecture: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3)}


def find_family(architectures: object) -> Family:
    """The family that serves config.json's `architectures`.

    Raises:
        UnsupportedModel: naming them and listing what is supported.
    """
    names = architectures if isinstance(architectures, list) else []
    for name in names:
        if isinstance(name, str) and name in FAMILIES:
            return FAMILIES[name]
    given = ", ".join(str(name) for name in names) or "none"
    raise UnsupportedModel(f"architecture {given:.200} is not supported. Supported: {', '.join(FAMILIES)}")
