"""Small integers packed into the 32-bit words of a tensor."""

import numpy as np

from jaxserve.models.formats.scheme import Tensors


def read_packed(
    tensors: Tensors, name: str, elements: slice, others: slice, bits: int, *, axis: int, order: tuple[int, ...] = ()
) -> np.ndarray:
    """Some of the integers of a packed matrix.

    Args:
        name: a tensor of int32 of two dimensions.
        elements: which integers, along the packed axis.
        others: which of the other axis.
        bits: of each integer: 4 or 8; the lowest bits of a word come first.
        axis: the packed one.
        order: where in a word each of its integers is; (): in their order.

    Returns:
        uint8 [others, elements].
    """
    count = 32 // bits
    words = slice(elements.start // count, -(-elements.stop // count))
    packed = tensors.read(name, (words, others) if axis == 0 else (others, words))
    packed = np.ascontiguousarray(packed.T if axis == 0 else packed)
    unpacked = unpack_words(packed.view(np.uint8), bits)
    if order:
        unpacked = unpacked.reshape(len(unpacked), -1, count)[:, :, order].reshape(len(unpacked), -1)
    first = words.start * count
    return unpacked[:, elements.start - first : elements.stop - first]


def unpack_words(packed: np.ndarray, bits: int) -> np.ndarray:
    """Integers uint8 [rows, n] of bytes uint8 [rows, n * bits / 8]; of 4 bits the low half of a byte comes first."""
    if bits == 8:
        return packed
    unpacked = np.empty((packed.shape[0], 2 * packed.shape[1]), np.uint8)
    np.bitwise_and(packed, 15, out=unpacked[:, 0::2])
    np.right_shift(packed, 4, out=unpacked[:, 1::2])
    return unpacked


def signed(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 codes from 0 on as int8 around zero: less 8 or 128."""
    return codes.view(np.int8) - np.int8(8) if bits == 4 else (codes ^ np.uint8(128)).view(np.int8)
