"""What stands between the projection of queries, keys and values and attention: api, reference, one file an implementation."""

from jaxserve.pallas_kernels.rotate_and_write_kv.api import rotate_and_write_kv as rotate_and_write_kv
