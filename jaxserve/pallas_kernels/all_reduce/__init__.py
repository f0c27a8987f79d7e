"""Sums over the shards of a mesh: api, reference, the memory that devices exchange, one file an implementation."""

from jaxserve.pallas_kernels.all_reduce.api import Shards as Shards
from jaxserve.pallas_kernels.all_reduce.api import all_gather as all_gather
from jaxserve.pallas_kernels.all_reduce.api import all_reduce as all_reduce
from jaxserve.pallas_kernels.all_reduce.api import all_reduce_add_rms_norm as all_reduce_add_rms_norm
from jaxserve.pallas_kernels.all_reduce.api import all_to_all as all_to_all
from jaxserve.pallas_kernels.all_reduce.exchange import MAX_SHARDS as MAX_SHARDS
from jaxserve.pallas_kernels.all_reduce.exchange import ExchangeLayout as ExchangeLayout
from jaxserve.pallas_kernels.all_reduce.exchange import peers_table as peers_table
