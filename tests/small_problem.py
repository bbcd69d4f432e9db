"""A network of two layers, and what the tests of the transformations do with it."""

import functools

import chex
import jax
import jax.numpy as jnp

import cram_jax
from cram_jax import (
    compressed_sam,
    cram,
    cram_plus,
    fake_quant,
    identity,
    n_m,
    one_of,
    sam,
    top_k,
)

PROJECTORS = {
    "identity": identity(),
    "top_k": top_k(0.5),
    "layer": top_k(0.7, scope="layer"),
    "n_m": n_m(2, 4),
    "fake_quant": fake_quant(4),
    "compose": cram_jax.compose(top_k(0.5), fake_quant(4)),
    "one_of": one_of(
        top_k(0.3), n_m(2, 4), fake_quant(3), probabilities=(0.2, 0.3, 0.5)
    ),
}
TRANSFORMATIONS = {
    "cram": cram,
    "cram_plus": cram_plus,
    "compressed_sam": compressed_sam,
    "cram_dense_gradients": functools.partial(cram, sparse_gradients=False),
    "cram_normalized": functools.partial(cram_plus, normalize=True),
    "sam": lambda loss_fn, projector, rho=0.05, **options: sam(loss_fn, rho, **options),
}


def make_params(seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        "first": {"kernel": jax.random.normal(keys[0], (4, 8)), "bias": jnp.ones(8)},
        "last": {"kernel": jax.random.normal(keys[1], (8, 2)), "bias": jnp.zeros(2)},
    }


def make_batch(seed=0, size=8):
    x, y = jax.random.split(jax.random.key(100 + seed))
    return jax.random.normal(x, (size, 4)), jax.random.normal(y, (size, 2))


def loss_fn(params, batch):
    x, y = batch
    hidden = jnp.tanh(x @ params["first"]["kernel"] + params["first"]["bias"])
    output = hidden @ params["last"]["kernel"] + params["last"]["bias"]
    return jnp.mean((output - y) ** 2)


def run(transformation, steps=3, **extra_args):
    """Plain descent along what the transformation gives."""
    params = make_params()
    state = transformation.init(params)
    update = jax.jit(transformation.update)
    for step in range(steps):
        batch = make_batch(step)
        grads = jax.grad(loss_fn)(params, batch)
        updates, state = update(grads, state, params, batch=batch, **extra_args)
        params = jax.tree.map(lambda p, u: p - 0.1 * u, params, updates)
    return params, state


def run_once(transformation, grads, params, batch):
    updates, state = transformation.update(
        grads, transformation.init(params), params, batch=batch
    )
    return updates, state.compressed_loss


def assert_close(ours, expected):
    # float32 sums in another order, over values of about 1.
    chex.assert_trees_all_close(ours, expected, rtol=1e-5, atol=2e-6)
