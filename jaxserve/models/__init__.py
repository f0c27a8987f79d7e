"""Model families on one decoder: a config.json in, a Flax NNX module out whose parameters are declared once."""

from jaxserve.models.config import KVGroup as KVGroup
from jaxserve.models.config import ModelConfig as ModelConfig
from jaxserve.models.decoder import Decoder as Decoder
from jaxserve.models.model import Architecture as Architecture
from jaxserve.models.model import Model as Model
from jaxserve.models.model import check_attention as check_attention
from jaxserve.models.registry import FAMILIES as FAMILIES
