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


def integer_attention(heads, query, key, value, ranges, mask=None, y_range=None):
    """What attention of bytes has to give, bit for bit.

    Args:
      heads: how many.
      query: uint8 (batch, length, features).
      key: the same.
      value: the same.
      ranges: what the bytes of the three stand for.
      mask: (batch, length), zero for padding.
      y_range: what bytes of the result stand for; None: floats.
    """
    batch, length, features = query.shape
    depth = features // heads
    q_range, k_range, v_range = ranges
    q, k, v = (
        x.reshape(batch, length, heads, depth).astype(np.int64)
        for x in (query, key, value)
    )
    # Any constant may be taken from the keys: a softmax does not see it.
    sums = np.einsum("bqhd,bkhd->bhqk", q - q_range.zero, k - 128)
    scale = np.float32(q_range.scale * k_range.scale * depth**-0.5)
    scores = sums.astype(np.float32) * scale
    if mask is not None:
        lowest = np.float32(-3.4028234e38)
        scores = np.where(mask[:, None, None] != 0, scores, lowest)
    e = float32_exp(scores - scores.max(-1, keepdims=True))
    weights, rest = np.zeros(e.shape, np.int64), np.zeros(e.shape[:-1], np.float32)
    for key_index in range(length):
        wanted = np.float32(np.float64(e[..., key_index]) * 255 + rest)
        whole = np.rint(wanted)
        weights[..., key_index], rest = np.minimum(whole, 255), wanted - whole
    total = weights.sum(-1).astype(np.float32)[..., None]
    attended = np.einsum("bhqk,bkhd->bhqd", weights, v - 128).astype(np.float32)
    unit, zero = v_range.scale / (y_range.scale if y_range else 1), v_range.zero
    offset = np.float32((128 - zero) * unit + (y_range.zero if y_range else 0))
    y = attended * (np.float32(unit) / total) + offset
    y = y.transpose(0, 2, 1, 3).reshape(batch, length, features)
    assert y.dtype == np.float32
    return y if y_range is None else np.rint(np.clip(y, 0, 255)).astype(np.uint8)


def float32_exp(x):
    """``exp`` of float32, at most 0, in the engine's operations and their order."""

    def fma(a, b, c):
        # A product of two float32 is exact in float64.
        return np.float32(np.float64(a) * np.float64(b) + np.float64(c))

    x = np.maximum(x, np.float32(-87.3)).astype(np.float32)
    magic = np.float32(12582912)
    power = fma(x, np.float32(1.44269504), magic) - magic
    rest = fma(power, np.float32(-0.693359375), x)
    rest = fma(power, np.float32(2.12194440e-4), rest)
    total = np.float32(1.9875691500e-4)
    for coefficient in (
        *(1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2),
        *(1.6666665459e-1, 5.0000001201e-1),
    ):
        total = fma(total, rest, np.float32(coefficient))
    total = fma(total * rest, rest, rest + np.float32(1))
    return np.ldexp(total, power.astype(int)).astype(np.float32)
