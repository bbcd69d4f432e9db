"""What the library computes, again: float64 NumPy, naive on purpose."""

import numpy as np


def keep_largest(arrays, k):
    """Masks of the k largest magnitudes over all arrays, the first ones on ties."""
    flat = np.concatenate([np.abs(np.asarray(a, np.float64)).ravel() for a in arrays])
    order = np.argsort(np.where(np.isnan(flat), -np.inf, -flat), kind="stable")
    mask = np.zeros(flat.size, bool)
    mask[order[: max(k, 0)]] = True
    ends = np.cumsum([np.size(a) for a in arrays])[:-1]
    return [
        part.reshape(np.shape(a))
        for part, a in zip(np.split(mask, ends), arrays, strict=True)
    ]


def n_m(array, n, m):
    """Keeps the n largest of every m weights along axis -2, the earlier one on ties."""
    moved = np.moveaxis(np.asarray(array, np.float64), -2, -1)
    mask = np.zeros(moved.shape, bool)
    for index in np.ndindex(moved.shape[:-1]):
        for start in range(0, moved.shape[-1], m):
            group = np.abs(moved[index][start : start + m])
            mask[index][start + np.argsort(-group, kind="stable")[:n]] = True
    return np.moveaxis(mask, -1, -2)


def fake_quant(array, bits):
    """Rounds each output channel to multiples of max|w| / (2**(bits - 1) - 1)."""
    values = np.array(array, np.float64)
    for channel in range(values.shape[-1]):
        scale = np.abs(values[..., channel]).max() / (2 ** (bits - 1) - 1)
        if scale > 0:
            values[..., channel] = np.round(values[..., channel] / scale) * scale
    return values
