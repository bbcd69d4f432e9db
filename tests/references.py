"""The library's computations once more: float64 NumPy, naive on purpose."""

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


def block_rms(array, block):
    """Root mean square of each block along the last axes, one entry a block."""
    values = np.asarray(array, np.float64)
    sides = list(block)
    if sides[0] is ...:
        sides = [None] * (values.ndim - len(sides) + 1) + sides[1:]
    sides = [1] * (values.ndim - len(sides)) + sides
    sides = [n if s is None else s for s, n in zip(sides, values.shape, strict=True)]
    scores = np.zeros([n // s for s, n in zip(sides, values.shape, strict=True)])
    for index in np.ndindex(scores.shape):
        place = tuple(
            slice(i * s, (i + 1) * s) for i, s in zip(index, sides, strict=True)
        )
        scores[index] = np.sqrt(np.mean(values[place] ** 2))
    return scores


def rounded(values, scale, low, high):
    """The multiples of a scale, from low to high of them, that are nearest."""
    return np.clip(np.round(values / scale), low, high) * scale if scale else values * 0


def quantization_range(smallest, largest, bits, symmetric):
    """Scale, lowest and highest integer of a range that holds zero."""
    smallest, largest = min(smallest, 0.0), max(largest, 0.0)
    if symmetric:
        highest = 2 ** (bits - 1) - 1
        return max(-smallest, largest) / highest, -highest, highest
    scale = (largest - smallest) / (2**bits - 1)
    low = np.round(smallest / scale) if scale else 0.0
    return scale, low, low + 2**bits - 1


def fake_quant(array, bits, symmetric=True, per="channel"):
    """Rounds each output channel, or all, to the range of its weights."""
    values = np.array(array, np.float64)
    parts = np.moveaxis(values, -1, 0) if per == "channel" else [values]
    for part in parts:
        part[...] = rounded(
            part, *quantization_range(part.min(), part.max(), bits, symmetric)
        )
    return values


def least_squares_error(values, bits, symmetric, shares):
    """The least squared error over a fine grid of clipped ranges."""
    return min(
        np.sum(
            (
                rounded(
                    values,
                    *quantization_range(
                        share * values.min(), share * values.max(), bits, symmetric
                    ),
                )
                - values
            )
            ** 2
        )
        for share in shares
    )


def dense_fisher(gradients, damping):
    """The empirical Fisher matrix of gradients: from (m, b) to (b, b)."""
    return damping * np.eye(gradients.shape[1]) + gradients.T @ gradients / len(
        gradients
    )


def constrained_minimum(hessian, optimum, kept):
    """Where the quadratic around an optimum is least with zeros: by the KKT system."""
    size, removed = len(optimum), np.flatnonzero(~kept)
    constraints = np.eye(size)[removed]
    system = np.block(
        [[hessian, constraints.T], [constraints, np.zeros((len(removed),) * 2)]]
    )
    right = np.concatenate([hessian @ optimum, np.zeros(len(removed))])
    return np.linalg.solve(system, right)[:size]
