"""The integers of weights that were rounded in blocks of inputs."""

from typing import NamedTuple

import numpy as np


class Levels(NamedTuple):
    """A kernel (inputs, outputs) as integers with scales, output by output.

    The last block is padded with zeros.

    Attributes:
      integers: (outputs, blocks, block) int8.
      scale: (outputs, blocks) float32, each exact in 16 bits.
      bits: width of the integers.
    """

    integers: np.ndarray
    scale: np.ndarray
    bits: int

    def unsigned(self) -> np.ndarray:
        """The integers as uint8, with ``2**(bits - 1)`` for zero."""
        return (self.integers.astype(np.int16) + 2 ** (self.bits - 1)).astype(np.uint8)


def quantise_blocks(kernel: np.ndarray, bits: int, block: int) -> Levels:
    """Symmetric integers in blocks along the inputs, with scales in float16.

    A kernel that `fake_quant` with ``block`` rounded gives its own integers and scales
    again: the largest weight of a block is ``2**(bits - 1) - 1`` times its scale, which
    is exact.

    Args:
      kernel: (inputs, outputs) float32.
      bits: from 2 to 8.
      block: inputs that share a scale.
    """
    inputs, outputs = kernel.shape
    blocks = -(-inputs // block)
    padded = np.zeros((outputs, blocks * block), np.float32)
    padded[:, :inputs] = kernel.T
    split = padded.reshape(outputs, blocks, block)
    highest = 2 ** (bits - 1) - 1
    scale = np.abs(split).max(axis=-1) / np.float32(highest)
    limit = np.finfo(np.float16).max
    scale = np.minimum(scale, limit).astype(np.float16).astype(np.float32)
    divisor = np.where(scale > 0, scale, 1)[..., None]
    integers = np.clip(np.rint(split / divisor), -highest, highest)
    integers[scale == 0] = 0
    return Levels(integers.astype(np.int8), scale, bits)
