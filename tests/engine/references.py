"""INT8 layers in exact integers and float32 NumPy, naive on purpose."""

import numpy as np

from cram_jax.engine.reference import windows


def integer_product(product, x, x_range, *, y_range=None, residual=None):
    """The bytes, or floats without ``y_range``, that a packed INT8 product has to give.

    Args:
      product: a `PackedProduct` without GELU or tanh.
      x: uint8 (batch, height, width, channels), or (batch, length, features) and so on.
      x_range: what its bytes stand for.
      y_range: what those of the result stand for.
      residual: None, float32 numbers, or a pair of bytes and their range.
    """
    weights = product.weights
    kernel = weights.dense().astype(np.int64)
    centred = x.astype(np.int64) - x_range.zero
    if x.ndim == 4:
        view = windows(centred, weights.window, product.strides, product.pads)
        sums = np.tensordot(view, kernel, 3)
    else:
        sums = centred @ kernel[0, 0]
    scale = weights.scale.astype(np.float64) * x_range.scale
    bias = product.bias.astype(np.float64)
    octets = isinstance(residual, tuple)
    if octets:
        bias = bias - residual[1].scale * residual[1].zero
    empty = ~kernel.any(axis=(0, 1, 2))
    scale = np.where(empty, np.maximum(np.abs(bias) / 2**24, 1e-30), scale)
    sums = sums + np.rint(bias / scale).astype(np.int64)
    assert np.abs(sums).max() < 2**31
    unit = y_range.scale if y_range else 1.0
    value = sums.astype(np.float32) * (scale / unit).astype(np.float32)
    if octets:
        value = value + residual[0].astype(np.float32) * np.float32(
            residual[1].scale / unit
        )
    elif residual is not None:
        value = value + residual * np.float32(1 / unit)
    assert value.dtype == np.float32
    if y_range is None:
        return np.maximum(value, 0) if product.activation == "relu" else value
    if y_range.zero:
        value = value + np.float32(y_range.zero)
    low = y_range.zero if product.activation == "relu" else 0
    return np.rint(np.clip(value, low, 255)).astype(np.uint8)
