"""The largest magnitude of floats, NaN among them.

Without its sign, a float's bits are an integer that grows with its magnitude, and NaN is above infinity. So maxima of integers find it,
whatever a device's maximum of floats makes of NaN.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_CACHED_BYTES = 1 << 19  # what a core's own cache has room for


def largest_magnitude(values: np.ndarray) -> float:
    """Of floats of any dtype and shape, on the host; NaN where an element is NaN; 0 where there is none.

    As unsigned integers the negative numbers are above all others, as signed ones below: one maximum of each, piece by piece.
    """
    size = values.dtype.itemsize
    flat, step, most = values.reshape(-1), _CACHED_BYTES // size, 0
    for start in range(0, flat.size, step):
        piece = flat[start : start + step]
        most = max(most, int(piece.view(f"u{size}").max()) - (1 << (8 * size - 1)), int(piece.view(f"i{size}").max()))
    return float_of_bits(most, values.dtype)


def magnitude_bits(x: jax.Array) -> jax.Array:
    """Unsigned [] of an array of floats, on its device, for `float_of_bits`."""
    bits = 8 * x.dtype.itemsize
    dtype = jnp.dtype(f"uint{bits}")
    return jnp.max(lax.bitcast_convert_type(x, dtype) & jnp.asarray((1 << (bits - 1)) - 1, dtype))


def float_of_bits(bits: int, dtype: np.dtype) -> float:
    """The number without sign that these bits are."""
    return float(np.array(bits, f"u{dtype.itemsize}").view(dtype))
