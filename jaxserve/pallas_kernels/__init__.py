"""Device operations behind one interface each: a validating api, a plain jnp reference, one file an implementation.

Imports nothing else of jaxserve. The layout of the KV cache is private to this package.
"""

from jaxserve.pallas_kernels.add_rms_norm import add_branch as add_branch
from jaxserve.pallas_kernels.add_rms_norm import add_rms_norm as add_rms_norm
from jaxserve.pallas_kernels.all_reduce import MAX_SHARDS as MAX_SHARDS
from jaxserve.pallas_kernels.all_reduce import ExchangeLayout as ExchangeLayout
from jaxserve.pallas_kernels.all_reduce import Shards as Shards
from jaxserve.pallas_kernels.all_reduce import all_gather as all_gather
from jaxserve.pallas_kernels.all_reduce import all_reduce as all_reduce
from jaxserve.pallas_kernels.all_reduce import all_reduce_add_rms_norm as all_reduce_add_rms_norm
from jaxserve.pallas_kernels.all_reduce import all_to_all as all_to_all
from jaxserve.pallas_kernels.all_reduce import peers_table as peers_table
from jaxserve.pallas_kernels.float16 import attention_dtype as attention_dtype
from jaxserve.pallas_kernels.float16 import narrowed as narrowed
from jaxserve.pallas_kernels.gpu import local_gpu as local_gpu
from jaxserve.pallas_kernels.layer_kv import KV_HEADS_AXIS as KV_HEADS_AXIS
from jaxserve.pallas_kernels.layer_kv import KVScales as KVScales
from jaxserve.pallas_kernels.layer_kv import LayerKV as LayerKV
from jaxserve.pallas_kernels.layer_kv import layer_kv_shape as layer_kv_shape
from jaxserve.pallas_kernels.layer_kv import make_layer_kv as make_layer_kv
from jaxserve.pallas_kernels.layer_kv import page_dtype as page_dtype
from jaxserve.pallas_kernels.log_sum_exp import log_sum_exp as log_sum_exp
from jaxserve.pallas_kernels.matmul import add_matmul as add_matmul
from jaxserve.pallas_kernels.matmul import add_parts as add_parts
from jaxserve.pallas_kernels.matmul import gated_matmul as gated_matmul
from jaxserve.pallas_kernels.matmul import matmul as matmul
from jaxserve.pallas_kernels.matmul import matmul_parts as matmul_parts
from jaxserve.pallas_kernels.matmul import multiply_gated as multiply_gated
from jaxserve.pallas_kernels.matmul import takes_fixed_order as takes_fixed_order
from jaxserve.pallas_kernels.metadata import AttentionMetadata as AttentionMetadata
from jaxserve.pallas_kernels.paged_attention import paged_attention as paged_attention
from jaxserve.pallas_kernels.paged_attention import plan_attention as plan_attention
from jaxserve.pallas_kernels.quantized_matmul import TABLES as TABLES
from jaxserve.pallas_kernels.quantized_matmul import Layout as Layout
from jaxserve.pallas_kernels.quantized_matmul import ScaleDtype as ScaleDtype
from jaxserve.pallas_kernels.quantized_matmul import pack as pack
from jaxserve.pallas_kernels.quantized_matmul import packed_shapes as packed_shapes
from jaxserve.pallas_kernels.quantized_matmul import quantized_add_matmul as quantized_add_matmul
from jaxserve.pallas_kernels.quantized_matmul import quantized_gated_matmul as quantized_gated_matmul
from jaxserve.pallas_kernels.quantized_matmul import quantized_matmul as quantized_matmul
from jaxserve.pallas_kernels.quantized_matmul import quantized_matmul_parts as quantized_matmul_parts
from jaxserve.pallas_kernels.quantized_matmul import weight_of as weight_of
from jaxserve.pallas_kernels.rotary_attention import rotary_attention as rotary_attention
from jaxserve.pallas_kernels.rotate_and_write_kv import rotate_and_write_kv as rotate_and_write_kv
from jaxserve.pallas_kernels.write_kv import write_kv as write_kv
