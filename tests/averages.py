"""Batches, and the statistics that recalibration should find for them."""

import jax
import numpy as np

BATCHES = [
    np.random.default_rng(seed).normal(2.0, 3.0, (16, 5)).astype(np.float32)
    for seed in range(4)
]


def float64_statistics(batches, weights=None):
    """Mean and biased variance of each batch, averaged; naive on purpose."""
    outputs = [np.asarray(batch, np.float64) for batch in batches]
    if weights is not None:
        outputs = [batch @ np.asarray(weights, np.float64) for batch in outputs]
    return (
        np.mean([x.mean(0) for x in outputs], axis=0),
        np.mean([x.var(0) for x in outputs], axis=0),
    )


def tolerance(momentum):
    return 2**-23 / (1 - momentum) + 1e-6


def moving_average(stats, new, momentum):
    return jax.tree.map(
        lambda old, value: momentum * old + (1 - momentum) * value, stats, new
    )
