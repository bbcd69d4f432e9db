"""Integers of four bits, two in a byte, the first one in the lower half."""

import numpy as np


def pack_nibbles(integers: np.ndarray) -> np.ndarray:
    """Integers from -8 to 7 as uint8; two along the last axis, which is even, in each.

    Zero is stored as 8.
    """
    nibbles = (integers.astype(np.int8) + 8).astype(np.uint8)
    return nibbles[..., 0::2] | nibbles[..., 1::2] << 4


def unpack_nibbles(pairs: np.ndarray) -> np.ndarray:
    """The integers of `pack_nibbles` as int8."""
    nibbles = np.stack([pairs & 15, pairs >> 4], axis=-1).astype(np.int8) - 8
    return nibbles.reshape(*pairs.shape[:-1], -1)
