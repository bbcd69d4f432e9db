"""Weights for PyTorch's networks and ours by one rule, so that they need no storing."""

import zlib

import numpy as np

# Small enough that activations neither grow nor vanish in ResNet-56 and ResNet-34.
SCALES = (0.4, 1.0)
VARIANCES = (0.7, 1.5)


def fill(name, shape):
    """The values of a tensor, from PyTorch's name and shape for it, float32.

    Uniform: for kernels of variance 2 / fan in around 0, for biases and running means
    within 0.1, for the scales and running variances of batch norm as above. The
    generator's seed is the CRC-32 of the name.
    """
    values = np.random.default_rng(zlib.crc32(name.encode())).random(shape, np.float32)
    kind = name.rsplit(".", 1)[1]
    if len(shape) > 1:
        bound = np.float32((6 / np.prod(shape[1:])) ** 0.5)
        low, high = -bound, bound
    else:
        low, high = {"weight": SCALES, "running_var": VARIANCES}.get(kind, (-0.1, 0.1))
    return np.float32(low) + np.float32(high - low) * values


def images(side, count=3):
    """Images as PyTorch has them: (count, 3, side, side), uniform with variance 1."""
    values = np.random.default_rng(side).random((count, 3, side, side), np.float32)
    return (values - np.float32(0.5)) * np.float32(12**0.5)
