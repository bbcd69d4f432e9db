"""Statistics as Linen, NNX, Haiku and Equinox keep them, recalibrated."""

import warnings
from functools import partial

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from averages import (
    BATCHES,
    float64_statistics,
    tolerance,
)
from flax import linen, nnx

from cram_jax import recalibrate

pytestmark = pytest.mark.usefixtures("quick_compilation")


class LinenNet(linen.Module):
    momentum: float
    frozen: bool = False

    @linen.compact
    def __call__(self, x, train):
        x = linen.Dense(3, use_bias=False)(x)
        x = linen.BatchNorm(
            use_running_average=self.frozen or not train, momentum=self.momentum
        )(x)
        x = linen.Dense(3, use_bias=False)(x)
        return linen.BatchNorm(
            use_running_average=not train, momentum=self.momentum, name="last"
        )(x)


def linen_pass(model):
    @jax.jit
    def training_pass(params, batch_stats, batch):
        _, updated = model.apply(
            {"params": params, "batch_stats": batch_stats},
            batch,
            train=True,
            mutable=["batch_stats"],
        )
        return updated["batch_stats"]

    return training_pass


def kernel(params, name):
    return np.asarray(params[name]["kernel"], np.float64)


@pytest.mark.parametrize(
    ("momentum", "dtype"),
    [(0.0, "float32"), (0.9, "float32"), (0.99, "bfloat16"), (0.999, "bfloat16")],
)
def test_a_linen_variables_dict_is_recalibrated(momentum, dtype):
    model = LinenNet(momentum)
    variables = model.init(jax.random.key(0), BATCHES[0], train=True)
    params = variables["params"]
    old = jax.tree.map(lambda s: s.astype(dtype), variables["batch_stats"])
    stats = recalibrate(partial(linen_pass(model), params), old, BATCHES)
    mean, variance = float64_statistics(BATCHES, kernel(params, "Dense_0"))
    # bfloat16 has 8 bits, so rounds by up to 2^-8.
    rtol = tolerance(momentum) + 1e-5 + (2**-8 if dtype == "bfloat16" else 0)
    first = jax.tree.map(np.float64, stats["BatchNorm_0"])
    np.testing.assert_allclose(first["mean"], mean, rtol=rtol)
    np.testing.assert_allclose(first["var"], variance, rtol=rtol)
    assert stats["last"]["mean"].dtype == dtype
    # The second normalisation sees what the batch's own statistics normalise.
    hidden = [x.astype(np.float64) @ kernel(params, "Dense_0") for x in BATCHES]
    hidden = [(x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) for x in hidden]
    _, variance = float64_statistics(hidden, kernel(params, "Dense_1"))
    np.testing.assert_allclose(np.float64(stats["last"]["var"]), variance, rtol=rtol)


def test_a_frozen_normalisation_keeps_its_statistics_and_normalises_with_them():
    model = LinenNet(0.99, frozen=True)
    variables = model.init(jax.random.key(0), BATCHES[0], train=True)
    params = variables["params"]
    old = variables["batch_stats"] | {
        "BatchNorm_0": {"mean": jnp.arange(3.0), "var": jnp.arange(1.0, 4)}
    }
    stats = recalibrate(partial(linen_pass(model), params), old, BATCHES)
    jax.tree.map(
        np.testing.assert_array_equal, stats["BatchNorm_0"], old["BatchNorm_0"]
    )
    hidden = [
        (np.float64(x) @ kernel(params, "Dense_0") - np.arange(3.0))
        / np.sqrt(np.arange(1.0, 4) + 1e-5)
        for x in BATCHES
    ]
    mean, variance = float64_statistics(hidden, kernel(params, "Dense_1"))
    np.testing.assert_allclose(
        stats["last"]["mean"], mean, rtol=tolerance(0.99), atol=1e-6
    )
    np.testing.assert_allclose(stats["last"]["var"], variance, rtol=tolerance(0.99))


class NnxNet(nnx.Module):
    def __init__(self, momentum, rngs):
        self.dense = nnx.Linear(5, 3, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(3, momentum=momentum, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.dense(x))


def nnx_passes(model):
    """The same pass as users write it: pure, and writing into what it is handed."""
    graph, params, _ = nnx.split(model, nnx.Param, nnx.BatchStat)

    def merged(copy, batch_stats, batch):
        model = nnx.merge(graph, params, batch_stats, copy=copy)
        model.train()
        model(batch)
        return nnx.state(model, nnx.BatchStat)

    def updated(batch_stats, batch):
        nnx.update(model, batch_stats)
        model.train()
        model(batch)
        return nnx.state(model, nnx.BatchStat)

    return {
        "jitted": jax.jit(partial(merged, True)),
        "merge": partial(merged, False),
        "update": updated,
    }


@pytest.mark.parametrize("form", ["jitted", "merge", "update"])
def test_an_nnx_model_is_recalibrated_even_if_a_pass_writes_into_its_statistics(form):
    model = NnxNet(0.99, nnx.Rngs(0))
    batch_stats = nnx.state(model, nnx.BatchStat)
    stats = recalibrate(nnx_passes(model)[form], batch_stats, BATCHES)
    mean, variance = float64_statistics(BATCHES, model.dense.kernel[...])
    np.testing.assert_allclose(stats["norm"]["mean"][...], mean, rtol=tolerance(0.99))
    np.testing.assert_allclose(
        stats["norm"]["var"][...], variance, rtol=tolerance(0.99)
    )
    assert jax.tree.structure(stats) == jax.tree.structure(batch_stats)


def test_a_pass_may_donate_its_statistics_and_return_its_own_buffers():
    buffers = {"mean": np.zeros(5, np.float32)}

    def apply(stats, batch):
        buffers["mean"][:] = donating(stats["mean"], batch)
        return buffers

    @partial(jax.jit, donate_argnums=0)
    def donating(mean, batch):
        return 0.9 * mean + 0.1 * batch.mean(0)

    stats = {"mean": jnp.ones(5)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a CPU may not use what is donated
        found = recalibrate(apply, stats, BATCHES)
    np.testing.assert_allclose(
        found["mean"], float64_statistics(BATCHES)[0], rtol=tolerance(0.9)
    )
    np.testing.assert_array_equal(stats["mean"], np.ones(5))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_haikus_bias_corrected_averages_are_recalibrated(dtype):
    def network(batch, train):
        return hk.BatchNorm(True, True, 0.99)(batch, is_training=train)

    model = hk.transform_with_state(network)
    params, start = model.init(jax.random.key(0), BATCHES[0], True)
    batches = [jnp.asarray(batch, dtype) for batch in BATCHES]
    apply = jax.jit(lambda state, batch: model.apply(params, state, None, batch, True))
    mean, variance = float64_statistics(batches)
    # Haiku computes the statistics of a batch in its dtype.
    rtol = tolerance(0.99) + (1e-5 if dtype == "float32" else 0.03)
    for steps in (0, 3, 500, 5000):
        state = jax.tree.map(
            lambda leaf, n=steps: leaf + n if leaf.dtype == jnp.int32 else leaf + 7,
            start,
        )
        found = recalibrate(lambda *args: apply(*args)[1], state, batches)
        for name, expected in (("mean", mean), ("var", variance)):
            average = found[f"batch_norm/~/{name}_ema"]
            for entry in ("average", "hidden"):
                np.testing.assert_allclose(
                    np.float64(average[entry][0]), expected, rtol=rtol
                )
        output, _ = model.apply(params, found, None, BATCHES[0], False)
        expected = (np.float64(BATCHES[0]) - mean) / np.sqrt(variance + 1e-5)
        if dtype == "float32":
            np.testing.assert_allclose(output, expected, atol=1e-4)


class EquinoxNet(eqx.Module):
    layers: list

    def __init__(self, mode):
        keys = jax.random.split(jax.random.key(0))
        self.layers = [
            eqx.nn.Linear(5, 3, use_bias=False, key=keys[0]),
            eqx.nn.BatchNorm(3, "batch", mode=mode),
            eqx.nn.Linear(3, 3, use_bias=False, key=keys[1]),
            eqx.nn.BatchNorm(3, "batch", mode=mode),
        ]

    def __call__(self, x, state, inference):
        seen = []
        for layer in self.layers:
            if isinstance(layer, eqx.nn.BatchNorm):
                seen.append(x)
                x, state = layer(x, state, inference=inference)
            else:
                x = layer(x)
        return seen, x, state


@pytest.mark.parametrize("mode", ["ema", "batch"])
@pytest.mark.parametrize("jitted", [True, False])
def test_equinoxs_averages_are_recalibrated(mode, jitted):
    """In "ema" the second normalisation depends on the statistics of the first.

    In "batch" inference divides by 1 - momentum^count, here of 3 passes.
    """
    model, state = eqx.nn.make_with_state(EquinoxNet)(mode)
    call = jax.vmap(
        model,
        axis_name="batch",
        in_axes=(0, None, None),
        out_axes=(0, 0, None),
    )

    def apply(state, batch):
        return call(batch, state, False)[2]

    for _ in range(3):
        state = apply(state, BATCHES[0])
    found = recalibrate(eqx.filter_jit(apply) if jitted else apply, state, BATCHES)

    first = [np.float64(x) @ np.float64(model.layers[0].weight).T for x in BATCHES]
    normal = [(x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) for x in first]
    second = [x @ np.float64(model.layers[2].weight).T for x in normal]
    inputs, outputs, _ = call(BATCHES[0], found, True)
    normalised = inputs[1] @ np.linalg.inv(np.float64(model.layers[2].weight).T)
    for x, y, (mean, variance) in (
        (inputs[0], normalised, float64_statistics(first)),
        (inputs[1], outputs, float64_statistics(second)),
    ):
        expected = (np.float64(x) - mean) / np.sqrt(variance + 1e-5)
        np.testing.assert_allclose(y, expected, atol=1e-3)
