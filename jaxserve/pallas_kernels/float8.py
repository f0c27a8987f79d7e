"""The values of float8 codes, by arithmetic of which a CPU's compiler makes vectors; of XLA's own conversion it does not."""

import jax
import jax.numpy as jnp
from jax import lax


def float8_values(codes: jax.Array, float8: jnp.dtype) -> jax.Array:
    """Bytes of float8_e4m3fn or float8_e5m2, no NaN among them, as float32 of the same shape. Exact."""
    bits = codes if codes.dtype == jnp.uint8 else lax.bitcast_convert_type(codes, jnp.uint8)
    if float8 == jnp.float8_e5m2:  # the upper half of a float16
        return lax.bitcast_convert_type(bits.astype(jnp.uint16) << jnp.uint16(8), jnp.float16).astype(jnp.float32)
    bits = bits.astype(jnp.uint32)
    sign, rest = (bits & jnp.uint32(0x80)) << jnp.uint32(24), bits & jnp.uint32(0x7F)
    normal = (rest << jnp.uint32(20)) + jnp.uint32(120 << 23)  # exponents count from -7 and from -127
    subnormal = rest.astype(jnp.float32) * jnp.float32(2**-9)
    magnitude = jnp.where(rest < jnp.uint32(8), lax.bitcast_convert_type(subnormal, jnp.uint32), normal)
    return lax.bitcast_convert_type(magnitude | sign, jnp.float32)
