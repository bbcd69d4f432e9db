"""A small problem whose gradient is written by hand, in float64 NumPy."""

import jax.numpy as jnp
import numpy as np

INPUTS = np.random.default_rng(0).normal(size=(6, 4))
OUTPUTS = np.random.default_rng(1).normal(size=(6, 3))
START = {
    "bias": np.random.default_rng(2).normal(size=3),
    "kernel": np.random.default_rng(3).normal(size=(4, 3)),
}


def loss_fn(params):
    error = INPUTS @ params["kernel"] + params["bias"] - OUTPUTS
    return jnp.sum(error**2) / 2


def gradient(params):
    error = INPUTS @ params["kernel"] + params["bias"] - OUTPUTS
    return {"bias": error.sum(axis=0), "kernel": INPUTS.T @ error}
